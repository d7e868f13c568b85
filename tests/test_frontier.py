"""The frontier: several budgets, one registered point; on real DVC, Prefect and MLflow with toy stages."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
import yaml
from matplotlib.figure import Figure
from prefect import get_client
from test_flow import runs
from toy import ROOT, STAGES, TOY, make_toy

from finercut.report.frontier import FrontierReport, Point, choose, draw
from finercut.system.records import Spread
from pipelines import frontier, pages, register
from pipelines.flow import compress


def point(amount, retention, passed=True, **shares):
    return Point(
        amount=amount,
        removed=[],
        shares={"sublayers": amount, "parameters": amount, "kv_cache": amount} | shares,
        mean_retention=retention,
        perplexity_ratio=1.5,
        speed_up=1 + amount,
        passed=passed,
        reasons=[] if passed else ["speed_up is 1"],
        sha256="0",
        run_id="0",
    )


def test_the_leanest_or_the_best_of_those_that_pass_is_chosen():
    points = [point(0.1, 0.95), point(0.2, 0.9), point(0.3, 0.99, passed=False)]
    assert choose(points, "parameters", "leanest").amount == 0.2
    assert choose(points, "parameters", "best").amount == 0.1
    assert choose([point(0.1, 0.9), point(0.2, 0.9)], "parameters", "best").amount == 0.2
    # by the budget's own cost, not by its amount
    assert choose([point(0.1, 0.9, kv_cache=0.5), point(0.2, 0.9)], "kv_cache", "leanest").amount == 0.1
    assert choose(points[2:], "parameters", "leanest") is None


def test_the_picture_has_errors_spreads_and_predictions():
    found = point(0.2, 0.9).model_copy(
        update={
            "mean_retention_stderr": 0.03,
            "speed_up_spread": Spread(median=1.2, low=1.1, high=1.4),
            "predicted_speed_up": 1.15,
        }
    )
    report = FrontierReport(unit="parameters", rule="leanest", points=[point(0.1, 0.95), found], chosen=0.2)
    quality, speed = Figure().subplots(1, 2)
    draw(report, quality, speed)

    def bars(axes):
        (ends,) = axes.containers[1].lines[2][0].get_segments()
        return ends.round(6).tolist()

    assert bars(quality) == [[20, 87], [20, 93]]
    assert bars(speed) == [[20, 1.1], [20, 1.4]]
    assert speed.lines[-1].get_xydata().tolist() == [[20, 1.15]]
    assert found.measured_and_predicted == "x 1.20 [1.10, 1.40], predicted 1.15"


@pytest.fixture
def toy(tmp_path, mlflow_store, monkeypatch, prefect_server):
    """A toy whose checkpoint and speed-up depend on the budget: 0.98 for 0.1, which the gate refuses, 1.25 beyond."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    prune = STAGES["prune"] | {
        "cmd": f"{TOY} model && grep -o 'amount: [0-9.]*' params.yaml >> artifacts/quantised/model.safetensors",
        "params": ["prune.budget"],
    }
    faster = "grep -q 'amount: 0.1$' params.yaml && echo 0.98 > speed_up.txt || echo 1.25 > speed_up.txt"
    throughput = STAGES["throughput"] | {"cmd": f"({faster}) && {TOY} throughput", "params": ["prune.budget"]}
    throughput["deps"] = ["reports/prove.json", "artifacts/quantised"]
    whole = {"cmd": "echo whole >> measured.txt && echo {} > reports/whole.json", "outs": ["reports/whole.json"]}
    return make_toy({"search": whole, "prune": prune, "evaluate": STAGES["evaluate"], "throughput": throughput})


@pytest.fixture
def asked(monkeypatch):
    """With which params the flow asked whether their budgets can be reached; the toy has no model to ask about."""
    found = []
    monkeypatch.setattr("pipelines.flow._check_reach", found.append)
    return found


def test_each_budget_is_a_child_run_and_the_leanest_that_passes_is_registered(toy, asked):
    report = compress(budgets=[0.1, 0.2], unit="parameters", rule="best")
    # 0.1 and 0.2 keep the same accuracy in this toy; 0.1 does not pass
    assert report.status == "registered"
    found = FrontierReport.read(Path("reports/frontier.json"))
    assert [(p.amount, p.passed, p.speed_up) for p in found.points] == [(0.1, False, 0.98), (0.2, True, 1.25)]
    assert (found.unit, found.rule, found.chosen) == ("parameters", "best", 0.2)
    assert yaml.safe_load(Path("params.yaml").read_text())["prune"]["budget"] == {"unit": "parameters", "amount": 0.2}
    *children, parent = runs(toy["flow"]["experiment"])
    assert parent.data.tags["frontier"] == "0.1, 0.2"
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    with get_client(sync_client=True) as prefect:
        assert prefect.read_flow_run(children[0].data.tags["prefect.flow_run_id"]).name == parent.info.run_name
    told = [(child.data.tags["frontier.amount"], child.data.tags["gate"]) for child in reversed(children)]
    assert told == [("0.2", "passed"), ("0.1", "refused"), ("0.2", "passed")]
    client = mlflow.MlflowClient()
    stored = [artifact.path for artifact in client.list_artifacts(parent.info.run_id, "reports")]
    assert stored == ["reports/frontier.json", "reports/frontier.png"]
    # the later budgets were asked about before the first search
    assert [[later.prune.budget.amount for later in others] for others in asked] == [[0.1]]
    # what does not depend on the budget ran once, and the chosen point came from the cache
    assert Path("measured.txt").read_text() == "whole\n"
    assert {children[0].data.tags[f"stage.{name}"] for name in STAGES} == {"cached"}
    assert "| 0.2 * " in frontier.markdown()
    # its page, the workspace's and the version's, has the frontier
    for whose in (None, f"models:/{report.name}@challenger"):
        pages.write(whose, Path("page.html"))
        assert "chosen, this page" in Path("page.html").read_text()


def test_a_number_of_sublayers_that_was_chosen_is_a_number_in_params(toy, asked):
    # As JSON and deployments give them.
    report = compress(budgets=[1.0, 2.0], unit="sublayers", rule="best")
    assert report.status == "registered"
    chosen = FrontierReport.read(Path("reports/frontier.json")).chosen
    budget = yaml.safe_load(Path("params.yaml").read_text())["prune"]["budget"]
    assert budget == {"unit": "sublayers", "amount": chosen}
    assert type(budget["amount"]) is int


def test_where_no_point_passes_params_stay_as_they_were(toy):
    before = Path("params.yaml").read_text()
    with pytest.raises(
        register.Refused, match=r"^no point of the frontier passes the gate: 0.1 parameters, speed-up 0.98"
    ):
        compress(budgets=[0.1], unit="parameters")
    assert Path("params.yaml").read_text() == before
    assert mlflow.MlflowClient().search_model_versions(f"name = '{toy['register']['name']}'") == []
    assert runs(toy["flow"]["experiment"])[-1].info.status == "FAILED"


@pytest.mark.parametrize(
    ("budgets", "message"),
    [([0.2, 0.2], "name one twice"), ([0.2, 7.0], "a budget in parameters is a share between 0 and 1, got 7")],
)
def test_budgets_that_are_not_allowed_are_refused_before_anything_runs(toy, budgets, message):
    before = Path("params.yaml").read_text()
    with pytest.raises(ValueError, match=message):
        compress(budgets=budgets, unit="parameters")
    assert Path("params.yaml").read_text() == before
    assert not Path("measured.txt").exists()
