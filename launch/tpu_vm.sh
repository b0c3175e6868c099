#!/usr/bin/env bash
# Runs a moejax command on all workers of a Cloud TPU VM (one host or a pod slice) over ssh.
#
#   launch/tpu_vm.sh --tpu=NAME --zone=ZONE [--project=P] [--dry_run] ACTION
#
#   install                  sends this checkout to every worker and installs it there, with [tpu]
#   run FLAGS...             python -m launch.train --multihost=auto FLAGS on every worker
#   exec COMMAND...          another command on every worker, in the checkout
#   stop                     SIGTERM to the run on every worker: it saves and exits
#
#   launch/tpu_vm.sh --tpu=pod --zone=us-east5-a install
#   launch/tpu_vm.sh --tpu=pod --zone=us-east5-a run --config=configs/mixtral_8x7b_sft.py \
#       --config.model.source=/mnt/bucket/mixtral --workdir=/mnt/shared/runs/mixtral
#
# Both are paths, the same on every worker, where you have mounted them: the model may be in a bucket
# (gcsfuse); --workdir is one file system that all workers write to (Filestore or other NFS).
# --dry_run prints the commands and runs none. Checked by shellcheck and its dry run; never run on
# a TPU VM.
set -euo pipefail

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $1"; exit 2; }
usage="usage: launch/tpu_vm.sh --tpu=NAME --zone=ZONE [--project=P] [--dry_run] install|run|exec|stop ..."

tpu='' zone='' project='' dry_run='' checkout=moejax
while [ $# -gt 0 ]; do
    case $1 in
        --tpu=?*) tpu=${1#*=} ;;
        --zone=?*) zone=${1#*=} ;;
        --project=?*) project=${1#*=} ;;
        --dry_run) dry_run=yes ;;
        --help | -h) sed -n '2,18p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; exit 0 ;;
        --*) fail "unknown flag $1; $usage" ;;
        *) break ;;
    esac
    shift
done
[ -n "$tpu" ] || fail "--tpu is missing; $usage"
[ -n "$zone" ] || fail "--zone is missing; $usage"
[ $# -ge 1 ] || fail "$usage"
action=$1
shift

where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

gcloud_() {
    if [ -n "$dry_run" ]; then
        printf 'gcloud'
        printf ' %q' "$@"
        printf '\n'
    else
        gcloud "$@"
    fi
}

# A command on every worker at once; gcloud fails if one of them does.
everywhere() {
    gcloud_ compute tpus tpu-vm ssh "$tpu" "${where[@]}" --worker=all --command="$1"
}

quoted() {
    local words
    printf -v words '%q ' "$@"
    printf '%s' "${words% }"
}

# The folder goes only if the one before it was installed whole.
install_() {
    local root archive
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    archive=$(mktemp -t moejax.XXXXXX.tar.gz)
    # shellcheck disable=SC2064  # the name is known now
    trap "rm -f '$archive'" EXIT
    git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    gcloud_ compute tpus tpu-vm scp "$archive" "$tpu:moejax.tar.gz" "${where[@]}" --worker=all
    everywhere "set -e; rm -rf $checkout.new; mkdir $checkout.new
tar -xzf moejax.tar.gz -C $checkout.new
rm -rf $checkout; mv $checkout.new $checkout
cd $checkout; launch/environment .venv --extra tpu"
}

case $action in
    install) install_ ;;
    run)
        [ $# -ge 1 ] || fail "run takes the flags of launch.train; $usage"
        everywhere "cd $checkout; exec .venv/bin/python -m launch.train --multihost=auto $(quoted "$@")"
        ;;
    exec)
        [ $# -ge 1 ] || fail "exec takes a command; $usage"
        everywhere "cd $checkout; exec $(quoted "$@")"
        ;;
    stop) everywhere "pkill --signal TERM --full 'python -m launch[.]train' || true" ;;
    *) fail "unknown action $action; $usage" ;;
esac
