"""W&B: the workspace as it would be sent, and artefacts made again of what its API gives; a small API on loopback."""

import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wandb
from test_experiments import leave_spectra, no_texts, record_of  # noqa: F401, laptop cells on packaged speeches

from experiments import online
from experiments.__main__ import main
from experiments.artefacts import load
from experiments.cells import fingerprint_of, overrides_of
from welore import metrics
from welore.config import to_config
from welore.errors import Refused
from welore.finished import composed
from welore.loggers import RECORD
from welore.records import HISTORY

ROOT = Path(__file__).parent.parent
VIEWER = {"id": "1", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
LAST = {"endCursor": None, "hasNextPage": False}


class Api(BaseHTTPRequestHandler):
    """The part of W&B's API that reads runs and files: `server.runs` are nodes, `server.folders` hold their files."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        query, variables = asked["query"], asked.get("variables", {})
        if "RunFiles" in query:
            data = {"project": {"internalId": "1", "run": self.files(variables)}}
        elif "runs(" in query:
            edges = [{"node": node, "cursor": str(i)} for i, node in enumerate(self.server.runs)]
            found = {"edges": edges, "pageInfo": LAST}
            data = {"project": {"internalId": "1", "runCount": len(edges), "readOnly": False, "runs": found}}
        else:
            data = {"viewer": VIEWER}
        self.answer(json.dumps({"data": data}).encode())

    def files(self, variables):
        folder, wanted = self.server.folders[variables["name"]], variables["fileNames"]
        there = [path for path in sorted(folder.iterdir()) if path.name in wanted]
        edges = [{"node": self.file(path, variables["name"]), "cursor": "1"} for path in there]
        return {"fileCount": len(edges), "files": {"edges": edges, "pageInfo": LAST}}

    def file(self, path, run):
        url = f"http://127.0.0.1:{self.server.server_port}/{run}/{path.name}"
        size = path.stat().st_size
        return {"id": "1", "name": path.name, "url": url, "directUrl": url, "sizeBytes": size, "mimetype": ""} | {
            "updatedAt": "2026-01-01T00:00:00",
            "md5": "",
        }

    def do_GET(self):
        run, file = self.path.strip("/").split("/")
        self.server.fetched.append(file)
        self.answer((self.server.folders[run] / file).read_bytes())

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Nothing."""


@pytest.fixture
def api(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.runs, server.folders, server.fetched = [], {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    yield server
    wandb.teardown()  # it remembers the key, and another test is about its absence
    server.shutdown()


def node(record):
    """A run as the API gives it, from a record as `welore.loggers` lays it down."""
    about = {key: getattr(record, key) for key in ("fingerprint", "commit", "environment", "started", "seconds")}
    about |= {"status": record.status, "error": record.error}
    about["empty"] = [key for key, value in record.metrics.items() if value is None]
    summary = {key: value for key, value in record.metrics.items() if value is not None}
    summary |= {RECORD: about, "_step": 7, "train/loss": 2.0, "epoch": 0, "_wandb": {"runtime": 3}}
    config = {key: {"value": value} for key, value in record.config.items()}
    empty = dict.fromkeys(("sweepName", "jobType", "commit", "description", "notes", "historyKeys"))
    return empty | {
        "id": record.fingerprint,
        "name": record.fingerprint,
        "displayName": record.fingerprint,
        "projectId": "1",
        "tags": [],
        "state": "finished",
        "group": "figure7",
        "readOnly": False,
        "createdAt": "2026-01-01T00:00:00",
        "heartbeatAt": "2026-01-01T00:00:00",
        "config": json.dumps(config),
        "summaryMetrics": json.dumps(summary),
        "systemMetrics": "{}",
        "historyLineCount": 3,
        "user": {"name": "me", "username": "me"},
    }


def put(api, name, folder, count=None):
    """The laptop cells of an artefact as runs of the API; their records."""
    records = []
    for cell in load(name).cells("laptop")[:count]:
        config = to_config(composed(overrides_of(cell)))
        record = record_of(cell, fingerprint_of(cell), asdict(config))
        record.metrics["compress/predicted_nats"] = None
        api.runs.append(node(record))
        api.folders[record.fingerprint] = folder / record.fingerprint
        leave_spectra(api.folders[record.fingerprint])
        records.append(record)
    return records


def test_a_record_is_the_same_after_its_way_through_wandb(api, tmp_path):
    (record,) = put(api, "figure7", tmp_path / "there")
    record.metrics |= {"tuned/perplexity": None, "dense/perplexity": None}
    summary = json.loads(api.runs[0]["summaryMetrics"])
    summary |= {"tuned/perplexity": "NaN", "dense/perplexity": math.inf}
    api.runs[0]["summaryMetrics"] = json.dumps(summary)  # with the sign that JSON does not have
    runs = online.read("wandb:me/welore", str(tmp_path), fingerprint_of)
    assert [found for _, found in runs.latest.values()] == [record]


@pytest.mark.parametrize(
    ("name", "files"),
    [("figure7", ["ranks.json", "spectra.safetensors"]), ("figure2", ["probe-emergence.json"] * 3)],
)
def test_an_artefact_is_rebuilt_from_wandb_with_the_files_that_it_draws(name, files, api, tmp_path, capsys):
    put(api, name, tmp_path / "there")
    for _ in range(2):  # the second time they are there
        assert main([name, "source=wandb:me/welore", f"outputs={tmp_path / 'here'}"]) == 0
        assert f"# Figure {name[-1]}" in capsys.readouterr().out
        assert sorted(api.fetched) == files


def test_a_table_of_wandb_has_gaps_where_runs_are_missing(api, tmp_path, capsys):
    put(api, "table1", tmp_path / "there", count=3)
    assert main(["table1", "source=wandb:me/welore", f"outputs={tmp_path / 'here'}"]) == 1
    assert "17 of 20 cells are missing" in capsys.readouterr().out


def test_the_curves_of_the_report_come_from_wandb_too(api, tmp_path):
    record = put(api, "table1", tmp_path / "there", count=4)[-1]
    api.runs[-1] = node(record.__class__(**asdict(record) | {"metrics": record.metrics | {"fit/steps": 1}}))
    runs = online.read("wandb:me/welore", str(tmp_path), fingerprint_of)
    folder, _ = runs.latest[record.fingerprint]
    runs.fetch(folder, HISTORY)
    assert (folder / HISTORY).read_text() == (api.folders[record.fingerprint] / HISTORY).read_text()


def test_runs_of_other_programs_are_left_out(api, tmp_path):
    put(api, "figure7", tmp_path / "there")
    api.runs.append(api.runs[0] | {"name": "other", "summaryMetrics": '{"loss": 1.0}'})
    assert len(online.read("wandb:me/welore", str(tmp_path), fingerprint_of).latest) == 1


@pytest.mark.parametrize("source", ["wandb:welore", "mlflow:me/welore", "wandb:me/../welore", "wandb:../.."])
def test_a_source_that_is_none_is_refused(source, tmp_path):
    with pytest.raises(Refused, match="wandb:ENTITY/PROJECT"):
        online.read(source, str(tmp_path), fingerprint_of)


def test_what_is_only_read_starts_no_run(capsys):
    assert main(["table1", "source=wandb:me/welore", "logger=none"]) == 2
    assert "only read" in capsys.readouterr().err


# The workspace.


@pytest.fixture(scope="module")
def dashboard():
    """What `scripts/dashboard.py` would send, without a key and without a network."""
    pytest.importorskip("wandb_workspaces")
    command = [sys.executable, "scripts/dashboard.py", "me/welore", "--print"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_BASE_URL": "http://127.0.0.1:1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_workspace_groups_runs_by_artefact_and_shows_what_is_logged(dashboard):
    section = dashboard["spec"]["section"]
    assert (dashboard["entity"], dashboard["project"]) == ("me", "welore")
    assert [key["name"] for key in section["runSets"][0]["grouping"]] == ["group"]
    known = {m.key for m in vars(metrics).values() if isinstance(m, metrics.Metric)}
    shown = {}
    for part in section["panelBankConfig"]["sections"]:
        for panel in part["panels"]:
            config = panel["config"]
            keys = [*config.get("metrics", []), config.get("xAxis"), config.get("yAxis")]
            names = {key.split(":")[-1].removeprefix("summary_metrics.") for key in keys if key}
            shown.setdefault(part["name"], set()).update(names - {"_step"})
    assert {name for names in shown.values() for name in names} <= known
    assert {"tuned/perplexity", "validation/perplexity"} <= shown["Perplexity"]
    assert {"train/tokens_per_second", "fit/tokens_per_second"} <= shown["Throughput"]
    assert {"train/peak_gib", "fit/peak_gib"} <= shown["Memory"]
    assert {"compress/err", "compress/keep"} <= shown["Budget"]


@pytest.mark.slow
def test_a_dashboard_without_a_project_says_what_to_write():
    pytest.importorskip("wandb_workspaces")
    done = subprocess.run(
        [sys.executable, "scripts/dashboard.py", "welore"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "ENTITY/PROJECT" in done.stderr
