"The files for operators: parsed, and every metric that a dashboard or an alert names exists in the server"
import ast
import configparser
import json
import re
import shutil
import subprocess

import pytest
import yaml

from notebooks import ROOT

OPS = ROOT/"ops"


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    "Names of the metrics of a server that was never started"
    from phoenix.deploy.serve import ACCESS
    from phoenix.deploy.service import ServeOptions, Service
    service = Service(ACCESS, ServeOptions(store=str(tmp_path_factory.mktemp("ops")/"s.db")))
    found = set(re.findall(r"^# TYPE (\w+) \w+", service.meters.text().decode(), re.M))
    for counter in ("requests", "refusals", "pictures", "audit_dropped"): assert f"phoenix_{counter}_total" in found
    return found | {"phoenix_request_seconds_bucket", "up"}


def names(text): return set(re.findall(r"\bphoenix_\w+|\bup\b", re.sub(r'"[^"]*"', "", text)))


def test_dashboard_and_alerts_name_metrics_that_exist(metrics):
    board, rules = json.loads((OPS/"dashboard.json").read_text()), yaml.safe_load((OPS/"alerts.yml").read_text())
    asked = [t["expr"] for p in board["panels"] for t in p["targets"]] + [r["expr"] for g in rules["groups"] for r in g["rules"]]
    assert len(asked) >= 15 and all(names(e) for e in asked)
    assert not set().union(*map(names, asked)) - metrics
    assert all(r["annotations"]["summary"] for g in rules["groups"] for r in g["rules"])
    assert yaml.safe_load((OPS/"prometheus.yml").read_text())["scrape_configs"][0]["metrics_path"] == "/metrics"


def test_compose():
    compose = yaml.safe_load((OPS/"compose.yml").read_text())
    assert set(compose["services"]) == {"phoenix", "store", "prometheus", "grafana"}
    me = compose["services"]["phoenix"]
    assert me["user"] not in ("0", "root") and me["read_only"] and me["cap_drop"] == ["ALL"]
    for name, s in compose["services"].items():
        assert set(s.get("secrets", [])) <= set(compose["secrets"]) and ":latest" not in s.get("image", "x:1") and ":" in s.get("image", "x:1")
        assert all(p.startswith("127.0.0.1:") for p in s.get("ports", [])), name
        for v in s.get("volumes", []):
            if v.startswith("./") and v.endswith(".yml:ro"): assert (OPS/v.partition(":")[0]).is_file(), v


def test_dockerfile():
    text = (OPS/"Dockerfile").read_text()
    steps = [line.split()[0] for line in re.sub(r"\\\n", " ", text).splitlines() if line and not line.startswith(("#", " "))]
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert set(steps) <= known and {"USER", "HEALTHCHECK", "STOPSIGNAL"} <= set(steps)
    assert steps.index("USER") < steps.index("ENTRYPOINT") and re.search(r"^USER [1-9]\d*$", text, re.M)
    assert all(re.fullmatch(r"FROM \S+:\d\S*( AS \w+)?", line) for line in text.splitlines() if line.startswith("FROM"))
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M):
        assert all((ROOT/p).exists() for p in line.split()), line


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not installed: pip install -e '.[fire]' brings it")
def test_the_dockerfile_is_lint_clean():
    said = subprocess.run(["hadolint", "--format", "tty", OPS/"Dockerfile"], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout


def test_unit_and_locustfile():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(OPS/"phoenix.service")
    s = unit["Service"]
    assert s["DynamicUser"] == "yes" and s["KillSignal"] == "SIGTERM" and "phoenix serve" in s["ExecStart"]
    assert float(s["TimeoutStopSec"]) > 30, "longer than the server drains"
    tree = ast.parse((OPS/"locustfile.py").read_text())
    paths = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.startswith("/v1/")}
    from phoenix.deploy.serve import ACCESS
    assert paths and paths <= {p for _, p in ACCESS}
