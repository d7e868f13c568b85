"""Evidence of versions that other finercuts may have written."""

import json

import example_reports
import pytest
import yaml

from finercut.registry import evidence


@pytest.fixture
def folder(tmp_path):
    for stage in ("fetch", "calibrate", "prune", "prove", "evaluate", "throughput"):
        getattr(example_reports, stage)().write(tmp_path / f"{stage}.json")
    return tmp_path


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_reports_of_a_version_are_read(folder):
    found = evidence.read(folder, "7")
    assert found.version == "7"
    assert found.evaluate.tasks["finercut_copying"].retention == 0.75
    assert (found.throughput.speed_up, found.prune.sha256, found.fetch.sha256) == (1.25, "5" * 64, "1" * 64)


def test_a_version_of_0_1_has_one_claim_the_parity_it_recorded(folder):
    proved = (folder / "prove.json").read_text()
    (folder / "prove.json").unlink()
    parity = {"passed": True, "tolerance": 0.001, "max_logit_difference": 0.0005, "max_logit_difference_cached": 0.0}
    (folder / "parity.json").write_text(json.dumps(parity))
    found = evidence.read(folder, "7")
    assert [(c.name, c.holds, c.limit, c.figures["max_logit_difference"]) for c in found.claims] == [
        ("prune", True, 0.001, 0.0005)
    ]
    assert found.sha256 == found.prune.sha256
    change(folder / "parity.json", passed=False)
    assert not evidence.read(folder, "7").claims[0].holds
    # Where both are there, the proof of the final checkpoint counts.
    (folder / "prove.json").write_text(proved)
    change(folder / "prove.json", sha256="7" * 64)
    assert evidence.read(folder, "7").sha256 == "7" * 64


def test_without_any_proof_the_report_that_is_missing_is_named(folder):
    (folder / "prove.json").unlink()
    with pytest.raises(ValueError, match=r"^version 7 carries no evidence/prove\.json: register it again$"):
        evidence.read(folder, "7")


def test_what_a_younger_finercut_writes_beside_is_passed_over(folder):
    change(folder / "evaluate.json", something="new")
    assert evidence.read(folder, "7").evaluate.mean_retention == 0.75


def test_what_no_rule_needs_may_be_missing(folder):
    proved = json.loads((folder / "prove.json").read_text())
    (folder / "prove.json").write_text(json.dumps({name: proved[name] for name in ("claims", "sha256")}))
    assert [claim.name for claim in evidence.read(folder, "7").claims] == ["prune"]


def test_settings_that_a_report_does_not_record_come_from_the_versions_params(folder):
    found = evidence.read(folder, "7")
    assert (found.evaluate.seed, found.throughput.kv_cache_gib, found.throughput.max_model_len) == (None, None, None)
    throughput = {"kv_cache_gib": 1.0, "max_model_len": 512, "speed_up": 9.0}
    params = {"evaluate": {"seed": 1234}, "throughput": throughput, "retention": {"versions": 3}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    found = evidence.read(folder, "7")
    assert (found.evaluate.seed, found.throughput.kv_cache_gib, found.throughput.max_model_len) == (1234, 1.0, 512)
    assert found.throughput.speed_up == 1.25
    change(folder / "throughput.json", kv_cache_gib=2.0)
    assert evidence.read(folder, "7").throughput.kv_cache_gib == 2.0


@pytest.mark.parametrize("text", ["evaluate: 3", "evaluate: {seed: yes}", "- a", "a: ["])
def test_params_of_another_form_complete_nothing(folder, text):
    (folder / "params.yaml").write_text(text)
    assert evidence.read(folder, "7").evaluate.seed is None


def test_evidence_that_is_a_file_is_no_evidence(folder):
    with pytest.raises(ValueError, match=r"^version 7 carries no evidence/prune\.json: register it again$"):
        evidence.read(folder / "evaluate.json", "7")


def test_a_source_with_fields_of_a_newer_version_is_read(folder):
    source = {"kind": "hub", "repository": "a/b", "revision": "main", "mirror": "eu"}
    (folder / "params.yaml").write_text(yaml.safe_dump({"fetch": {"source": source, "format": 1}}))
    assert evidence.source_of_whole(folder, "7").source.revision == "main"


def test_a_report_that_is_missing_or_lacks_what_is_needed_is_named(folder):
    change(folder / "throughput.json", speed_up="fast")
    with pytest.raises(ValueError, match=r"^evidence/throughput\.json of version 7 has no valid speed_up: "):
        evidence.read(folder, "7")
    (folder / "throughput.json").unlink()
    with pytest.raises(ValueError, match=r"^version 7 carries no evidence/throughput\.json: register it again$"):
        evidence.read(folder, "7")


def test_the_source_of_the_whole_model_comes_from_the_versions_own_params(folder):
    source = {"kind": "hub", "repository": "a/b", "revision": "main"}
    (folder / "params.yaml").write_text(yaml.safe_dump({"fetch": {"source": source}, "unknown": {}}))
    assert evidence.source_of_whole(folder, "7").source.repository == "a/b"


@pytest.mark.parametrize("text", [None, "", "[]", "fetch: {}", "fetch: {source: {kind: pickle}}", "a: ["])
def test_params_that_name_no_source_are_refused(folder, text):
    if text is not None:
        (folder / "params.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"^evidence/params\.yaml of version 7 names no source of a whole model$"):
        evidence.source_of_whole(folder, "7")
