"Keep the numbers of a sealed run beside the notebooks: `result.py RUN NAME` writes nbs/results/NAME.json, or says why not."
import json
import sys
from pathlib import Path

from phoenix.records import sha256_file, verify_run, write_json

root = Path(__file__).resolve().parents[1]


def kept(run):
    "What stays of a sealed run of committed code: metrics, parameters, circumstances and the hash of its seal"
    verdict = verify_run(run)
    made = json.loads((run / "provenance.json").read_text())
    if verdict.state != "sealed" or made["git"]["dirty"]:
        sys.exit(f"result: a kept run must be sealed and from committed code, got {verdict.state}, "
                 f"dirty: {made['git']['dirty']}; commit and run it again")
    parameters = json.loads((run / "parameters.json").read_text())
    if "data" in parameters: parameters["data"] = Path(parameters["data"]).name
    state = json.loads((run / "run.json").read_text())
    return {"run": run.name, "seal_sha256": sha256_file(run / "seal.json"), "notes": list(verdict.reasons),
            "parameters": parameters,
            "made": {k: made[k] for k in ("phoenix", "git", "python", "system", "cpu", "time")},
            "cpu_seconds": state["cpu_seconds"], "metrics": json.loads((run / "metrics.json").read_text())}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("result: say which run and under which name: python .ci/result.py runs/RUN NAME")
    target = root / "nbs/results" / f"{sys.argv[2]}.json"
    target.parent.mkdir(exist_ok=True)
    write_json(target, kept(Path(sys.argv[1]).resolve()))
    print(target.relative_to(root))
