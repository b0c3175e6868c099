"""Languages other than Python: how programs are built and run, and what this machine has of it."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moejax.evals.sandbox import Limits

_MIB = 1 << 20
_NODE_FOLDERS = ("/usr/share/nodejs", "/usr/lib/node_modules", "/usr/local/lib/node_modules")


@dataclasses.dataclass(frozen=True)
class Language:
    """One language.

    Attributes:
      name: for people.
      file: what the program is called.
      tools: the executables it needs, in the order in which `commands` use them as {0}, {1}.
      commands: run one after another; "{}" stands for the program's folder.
      finish: what prints a text at the end of the tests; %s is the text.
      place: "end" of the file, or how many closing braces from the end it is put before.
      package: finds the packages that tests name.
      install: how people get a package that is missing.
      reserves: whether its machine maps far more memory than it uses.
    """

    name: str
    file: str
    tools: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    finish: str
    place: int | str = "end"
    package: str = ""
    install: str = ""
    reserves: bool = False


LANGUAGES = {
    "javascript": Language(
        "JavaScript", "program.js", ("node",),
        (("{0}", "--max-old-space-size=256", "{}/program.js"),),
        "\nconsole.log(%s)\n", package=r"""require\(\s*["']([\w@/.-]+)["']\s*\)""",
        install="npm install {0}, then --package_folders=.../node_modules", reserves=True,
    ),
    "perl": Language(
        "Perl", "program.pl", ("perl",), (("{0}", "{}/program.pl"),),
        "\nprint %s . \"\\n\";\n", package=r"^\s*use\s+([A-Z]\w*(?:::\w+)*)",
        install="cpan {0} (or the distribution's package), or --package_folders=.../perl5",
    ),
    "cpp": Language(
        "C++", "program.cpp", ("g++",),
        (("{0}", "-std=c++17", "-O0", "-Wno-narrowing", "{}/program.cpp", "-o", "{}/program"),
         ("{}/program",)),
        "\nputs(%s); return 0;\n", place=1,
    ),
    "java": Language(
        "Java", "Problem.java", ("javac", "java"),
        (("{0}", "-J-Xmx256m", "-encoding", "UTF-8", "-d", "{}", "{}/Problem.java"),
         ("{1}", "-Xmx256m", "-Xss16m", "-ea", "-cp", "{}", "Problem")),
        "\nSystem.out.println(%s);\n", place=2, package=r"import\s+(org\.javatuples)",
        install="put javatuples' jar into --package_folders", reserves=True,
    ),
    "rust": Language(
        "Rust", "program.rs", ("rustc", "gcc"),
        (("{0}", "--edition=2021", "-C", "linker={1}", "{}/program.rs", "-o", "{}/program"),
         ("{}/program",)),
        "\nprintln!(\"{}\", %s);\n", place=1, reserves=True,
    ),
    "php": Language(
        "PHP", "program.php", ("php",),
        (("{0}", "-d", "display_errors=stderr", "{}/program.php"),), "\necho %s . \"\\n\";\n",
    ),
}  # fmt: skip
ALIASES = {"js": "javascript", "pl": "perl", "c++": "cpp", "rs": "rust", "node": "javascript"}
_NODE_OWN = {"assert", "util", "fs", "path", "crypto", "events", "os", "url", "buffer", "vm"}


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """What this machine has of a language; `missing` says what it has not, in one line."""

    language: Language
    paths: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    version: str = ""
    missing: str = ""

    def commands(self) -> list[list[str]]:
        """The commands with the tools' paths in them."""
        commands = [[_filled(p, self.paths) for p in c] for c in self.language.commands]
        if self.language.name == "C++":
            header = _precompiled(self.paths[0])
            if header:
                commands[0][1:1] = ["-I", header]
        if self.language.name == "Java":
            jars = [str(p) for f in self.folders for p in sorted(Path(f).glob("*.jar"))]
            for command in commands if jars else []:
                at = command.index("-cp") if "-cp" in command else None
                if at is None:
                    command[1:1] = ["-cp", ":".join(jars)]
                else:
                    command[at + 1] = ":".join([command[at + 1], *jars])
        return commands

    def limits(self, limits: Limits) -> Limits:
        """`limits`, widened to what a compiler or another language's machine needs."""
        return dataclasses.replace(
            limits,
            cpu_s=max(limits.cpu_s, 10),
            wall_s=max(limits.wall_s, 20.0),
            memory_bytes=max(limits.memory_bytes, 2048 * _MIB),
            file_bytes=max(limits.file_bytes, 64 * _MIB),
            disk_bytes=max(limits.disk_bytes, 256 * _MIB),
            processes=max(limits.processes, 64),
            open_files=max(limits.open_files, 256),
            address_space=not self.language.reserves,
        )


def language_of(name: str) -> str | None:
    """The key in LANGUAGES for a name that a data set uses, None if there is none."""
    lowered = name.lower()
    found = ALIASES.get(lowered, lowered)
    return found if found in LANGUAGES else None


@functools.cache
def find(name: str, package_folders: tuple[str, ...] = ()) -> Toolchain:
    """Looks for a language's tools on this machine."""
    language = LANGUAGES[name]
    paths = [shutil.which(tool) for tool in language.tools]
    lacking = [tool for tool, path in zip(language.tools, paths, strict=True) if path is None]
    if lacking:
        return Toolchain(language, missing=f"{language.name}: no {lacking[0]} on this machine")
    # The links of /etc/alternatives are not there in the sandbox; rustup's own link must stay one.
    found = [
        path if tool == "rustc" else os.path.realpath(path)
        for tool, path in zip(language.tools, paths, strict=True)
        if path
    ]
    folders = [os.path.abspath(folder) for folder in package_folders]
    homes = [os.path.dirname(path) for path in found if name != "rust"]
    homes = [home for home in homes if not home.startswith(("/usr/", "/bin/"))]
    version = _said([found[0], "--version"]).splitlines()
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}
    if name == "rust":
        root = _said([found[0], "--print", "sysroot"]).strip()
        if not os.path.isfile(f"{root}/bin/rustc"):
            return Toolchain(language, missing=f"Rust: {found[0]} names no toolchain")
        found[0], folders = f"{root}/bin/rustc", [root]
        environment["LD_LIBRARY_PATH"] = f"{root}/lib"  # without /proc $ORIGIN is not known
    elif name == "java":
        folders += [str(path) for path in Path("/etc").glob("java*")]
        home = os.path.dirname(os.path.dirname(found[1]))
        environment["LD_LIBRARY_PATH"] = f"{home}/lib:{home}/lib/jli"
    elif name == "javascript":
        node = [f for f in _NODE_FOLDERS if os.path.isdir(f)]
        environment["NODE_PATH"] = ":".join([*folders, *node])
    elif name == "perl":
        environment["PERL5LIB"] = ":".join(folders)
    elif name == "cpp":
        header = _precompiled(found[0])
        folders += [header] if header else []
    settings = tuple(environment.items())
    said = next((line for line in version if line.strip()), "")
    return Toolchain(language, tuple(found), (*folders, *homes), settings, said)


@functools.cache
def lacking_package(name: str, package: str, package_folders: tuple[str, ...] = ()) -> str:
    """Why tests that need `package` cannot run, "" if they can."""
    toolchain, language = find(name, package_folders), LANGUAGES[name]
    environment = dict(toolchain.environment)
    if name == "javascript":
        if package in _NODE_OWN or package.startswith("node:"):
            return ""
        here = any(os.path.isdir(f"{f}/{package}") for f in environment["NODE_PATH"].split(":"))
    elif name == "perl":
        asked = [toolchain.paths[0], f"-M{package}", "-e", "1"]
        here = subprocess.run(asked, env=environment, capture_output=True).returncode == 0
    else:
        here = any(any(Path(f).glob("*.jar")) for f in package_folders)
    how = language.install.format(package)
    return "" if here else f"{language.name}: package {package} is not installed ({how})"


def packages_of(name: str, tests: str) -> list[str]:
    """The packages that tests load."""
    pattern = LANGUAGES[name].package
    return list(dict.fromkeys(re.findall(pattern, tests, re.M))) if pattern else []


def report(package_folders: tuple[str, ...] = ()) -> dict[str, str]:
    """Per language its tool's version, or what is missing."""
    found = {name: find(name, package_folders) for name in LANGUAGES}
    return {name: toolchain.missing or toolchain.version for name, toolchain in found.items()}


def with_finish(language: Language, tests: str, text: str) -> tuple[str, bool]:
    """The tests with a line at their end that prints `text`; False where there is no place."""
    line = language.finish.replace("%s", f'"{text}"')
    if language.place == "end":
        return tests + line, True
    head = tests
    for _ in range(int(language.place)):
        head, brace, _ = head.rpartition("}")
        if not brace:
            return tests, False
    tail = tests[len(head) :]
    head = re.sub(r"return 0;\s*$", "", head)
    return head + line + tail, True


def _filled(part: str, paths: Sequence[str]) -> str:
    for i, path in enumerate(paths):
        part = part.replace(f"{{{i}}}", path)
    return part


def _said(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return done.stdout if done.returncode == 0 else ""


@functools.cache
def _precompiled(compiler: str) -> str:
    """A folder with bits/stdc++.h compiled once, which saves about a second a program; "" if none.

    Made for this process and removed with it.
    """
    folder = tempfile.mkdtemp(prefix="moejax-stdc++-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.makedirs(f"{folder}/bits")
    header = f"{folder}/bits/stdc++.h"
    Path(header).write_text("#include_next <bits/stdc++.h>\n")
    command = [compiler, "-std=c++17", "-O0", "-x", "c++-header", header, "-o", f"{header}.gch"]
    if subprocess.run(command, capture_output=True).returncode:
        return ""
    for path in (folder, f"{folder}/bits"):
        os.chmod(path, 0o755)
    for path in (header, f"{header}.gch"):
        os.chmod(path, 0o644)
    return folder
