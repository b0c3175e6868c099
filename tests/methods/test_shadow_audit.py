"""The audit: agreement and drift by hand, and when it falls back."""

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.methods.shadow_audit import Audit, AuditConfig, Comparison, compare


def test_agreement_and_drift_by_hand():
    dense = np.log([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]])
    sparse = np.log([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]) + 3.0
    found = compare(dense, sparse)
    kl = [
        0.7 * np.log(0.7 / 0.6) + 0.2 * np.log(0.2 / 0.3),
        0.5 * np.log(0.5 / 0.2) + 0.3 * np.log(0.3 / 0.5) + 0.2 * np.log(0.2 / 0.3),
    ]
    assert found.agreement == 0.5
    np.testing.assert_allclose(found.drift, np.mean(kl))
    assert compare(dense, dense).drift == 0
    assert compare(dense, np.full_like(dense, np.nan)).drift == np.inf


def test_share_of_requests():
    audit = Audit(AuditConfig(share=0.1))
    chosen = [n for n in range(5000) if audit.wants(n)]
    assert 400 < len(chosen) < 600
    assert chosen == [n for n in range(5000) if Audit(AuditConfig(share=0.1)).wants(n)]
    assert not any(Audit(AuditConfig(share=0)).wants(n) for n in range(100))
    assert all(Audit(AuditConfig(share=1)).wants(n) for n in range(100))


def test_falls_back_past_the_limit_and_stays_there():
    audit = Audit(AuditConfig(share=1, drift_limit=0.1, window=3, least=2))
    for number, drift in enumerate((0.5, 0.01)):
        assert audit.wants(number) and not audit.dense
        audit.add(Comparison(0.9, drift))
    assert audit.dense and audit.fell_back_at == 2
    for _ in range(5):
        audit.add(Comparison(1.0, 0.0))
    assert audit.dense and "dense since request 2" in str(audit)
    calm = Audit(AuditConfig(share=1, drift_limit=0.1, window=3, least=2))
    calm.wants(0)
    calm.add(Comparison(0.5, 9.0))
    assert not calm.dense  # one is not enough


def test_bad_settings():
    for bad in ({"share": 1.5}, {"share": -0.1}, {"drift_limit": 0}, {"least": 0}):
        with pytest.raises(InputError):
            AuditConfig(**bad)
