"""Keep a sealed run: `result.py RUN NAME` writes its numbers to nbs/results/NAME.json and shows its outputs in the notebook
that it ran, or says why not."""
import base64
import io
import json
import sys
from pathlib import Path

from PIL import Image
from fastcore.nbio import read_nb, write_nb
from phoenix.records import sha256_file, verify_run, write_json

root = Path(__file__).resolve().parents[1]
LONG = 3000 # characters of words that nobody reads beneath a cell


def kept(run):
    "What stays of a sealed run of committed code: metrics, parameters, circumstances and the hash of its seal"
    verdict = verify_run(run)
    made = json.loads((run / "provenance.json").read_text())
    if verdict.state != "sealed" or made["git"]["dirty"]:
        sys.exit(f"result: a kept run must be sealed and from committed code, got {verdict.state}, "
                 f"dirty: {made['git']['dirty']}; commit and run it again")
    parameters = json.loads((run / "parameters.json").read_text())
    parameters |= {k: Path(parameters[k]).name for k in ("data", "work") if parameters.get(k)}
    state = json.loads((run / "run.json").read_text())
    return {"run": run.name, "seal_sha256": sha256_file(run / "seal.json"), "notes": list(verdict.reasons),
            "parameters": parameters,
            "made": {k: made[k] for k in ("phoenix", "git", "python", "system", "cpu", "time")},
            "cpu_seconds": state["cpu_seconds"], "metrics": json.loads((run / "metrics.json").read_text())}


def small(png, most=40_000):
    "A picture of bounded size: fewer colours first, then fewer dots"
    image, share = Image.open(io.BytesIO(base64.b64decode(png))), 1.
    while len(base64.b64decode(png)) > most:
        file, sides = io.BytesIO(), [round(share*side) for side in image.size]
        image.convert("RGB").resize(sides).quantize(128).save(file, "PNG", optimize=True)
        png, share = base64.b64encode(file.getvalue()).decode(), .9*share
    return png


def said_by_tools(output):
    "Whether an output is a warning that names a file of the machine"
    return any("site-packages" in "".join(v) for v in output["data"].values())


def shown(outputs):
    "Outputs without progress, warnings and pages of plain words"
    said = "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream" and o["name"] == "stdout")
    said = "".join(line for line in said.splitlines(True) if not line.startswith("epoch "))
    words = [dict(output_type="stream", name="stdout", text=said.splitlines(True))] if said.strip() else []
    rest = [dict(o) for o in outputs if o["output_type"] in ("execute_result", "display_data") and not said_by_tools(o)
            and (o["data"].keys() - {"text/plain"} or len("".join(o["data"]["text/plain"])) <= LONG)]
    for o in rest:
        if o["output_type"] == "execute_result": o["execution_count"] = None
        if "image/png" in o["data"]: o["data"] = {**o["data"], "image/png": small("".join(o["data"]["image/png"]))}
    return words + [o for o in rest if "".join(o["data"]["text/plain"]).strip()]


def show(run, name, experiment):
    "Put a run's outputs beneath the cells they came from; a cell that was changed since has none"
    path = root / f"nbs/experiments/{experiment}.ipynb"
    nb, ran = read_nb(path), {c.id: c for c in read_nb(run / "notebook.ipynb").cells}
    changed = 0
    for cell in (c for c in nb.cells if c.cell_type == "code"):
        same = cell.id in ran and ran[cell.id].source == cell.source
        cell.outputs = shown(ran[cell.id].outputs) if same else []
        if "parameters" in cell.metadata.get("tags", []):
            file = f", with params/{name}.yaml" if (path.parent / f"params/{name}.yaml").exists() else ""
            said = f"What is shown below is the kept run {run.name}{file}.\n"
            cell.outputs = [dict(output_type="stream", name="stdout", text=[said])]
        elif not same: changed += 1
    write_nb(nb, path)
    return f"{path.relative_to(root)}: {changed} cells changed since, without outputs"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("result: say which run and under which name: python .ci/result.py runs/RUN NAME")
    run, name = Path(sys.argv[1]).resolve(), sys.argv[2]
    target = root / "nbs/results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    write_json(target, kept(run))
    print(target.relative_to(root))
    print(show(run, name, run.name.rsplit("-", 3)[0]))
