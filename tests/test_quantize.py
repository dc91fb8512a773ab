"""Calibration in a stream: memory, chunks, and the search for skips, where a notebook can't see them."""
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from phoenix.deploy.quantize import METHODS, find_ranges, quantize_int8, quantised_nodes, run_logits
from phoenix.deploy.quantize import partly_float, round_late
from phoenix.settings import PhoenixError

GRAPH = '''<ir_version: 8, opset_import: ["" : 18]>
toy (float[N,1,64,64] images) => (float[N,3] logits) {
  c0 = Conv <pads=[1,1,1,1]> (images, w0)   r0 = Relu(c0)   c1 = Conv <pads=[1,1,1,1]> (r0, w1)   r1 = Relu(c1)
  axes = Constant <value = int64[2] {2,3}> ()   p = ReduceMean <keepdims=0> (r1, axes)   logits = Gemm <transB=1> (p, w2) }'''


def toy(path):
    "Two convolutions on 64×64, whose activations take half a megabyte an image"
    r, g = np.random.default_rng(0), onnx.parser.parse_model(GRAPH)
    for i, s in enumerate(((16, 1, 3, 3), (16, 16, 3, 3), (3, 16))):
        g.graph.initializer.append(numpy_helper.from_array(r.normal(size=s).astype(np.float32), f'w{i}'))
    for n in g.graph.node: n.name = f'{n.output[0]}/{n.op_type}'
    onnx.save(onnx.shape_inference.infer_shapes(g), path)
    return path


PEAKS = """
import sys
from pathlib import Path
import numpy as np
from phoenix.deploy.quantize import find_ranges
method, path = sys.argv[1:]
images = np.random.default_rng(1).random((512, 1, 64, 64), np.float32)
def mark(name): return next(int(x.split()[1]) for x in Path('/proc/self/status').read_text().splitlines() if x.startswith(name))/1024
def peak(n):
    "Highest resident memory while ranges are found, in MiB over what was there before"
    Path('/proc/self/clear_refs').write_text('5')  # the high-water mark starts anew
    before = mark('VmRSS')
    find_ranges(path, images[:n], method)
    return mark('VmHWM') - before
find_ranges(path, images[:8], method)
print(peak(64), peak(512))
"""


@pytest.mark.parametrize('method', ['entropy', *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != 'entropy')])
def test_memory_does_not_grow_with_the_images(method, tmp_path):
    "In a process of its own: what other tests have freed would hide or add memory here"
    done = subprocess.run([sys.executable, '-c', PEAKS, method, str(toy(tmp_path/'a.onnx'))], capture_output=True, text=True)
    few, many = map(float, done.stdout.split()) if done.stdout else pytest.fail(done.stderr[-2000:])
    print(f'{method}: {few:.1f} MiB for 64 images, {many:.1f} MiB for 512; all activations of 512 are 514 MiB')
    assert many < few + 12, (few, many)


@pytest.mark.parametrize('method', METHODS)
def test_ranges_do_not_depend_on_chunks(method, tmp_path):
    path, images = toy(tmp_path/'a.onnx'), np.random.default_rng(1).random((12, 1, 64, 64), np.float32)
    a, b = (find_ranges(path, images, method, chunk=c) for c in (5, 12))
    for t in a: np.testing.assert_allclose(a[t], b[t], rtol=2e-6)


def test_activations_are_unsigned_weights_signed_and_a_late_file_answers_alike(tmp_path):
    path, images = toy(tmp_path/'a.onnx'), np.random.default_rng(1).random((20, 1, 64, 64), np.float32)
    quantize_int8(path, tmp_path/'q.onnx', images)
    g = onnx.load(tmp_path/'q.onnx').graph
    kinds = {t.name: t.data_type for t in g.initializer}
    assert {kinds[n.input[2]] for n in g.node if n.op_type == 'QuantizeLinear'} == {onnx.TensorProto.UINT8}
    assert all(kinds[f'w{i}_quantized'] == onnx.TensorProto.INT8 for i in (1, 2))
    assert quantised_nodes(tmp_path/'q.onnx') == ['c1/Conv', 'logits/Gemm']
    round_late(tmp_path/'q.onnx', tmp_path/'late.onnx')
    partly_float(path, tmp_path/'late.onnx', ['c1/Conv', 'logits/Gemm'], tmp_path/'f.onnx')  # also of a late file
    np.testing.assert_allclose(run_logits(tmp_path/'f.onnx', images), run_logits(path, images), atol=1e-5)


def test_a_wrong_rule_is_refused(tmp_path):
    with pytest.raises(PhoenixError, match='percent must lie'):
        find_ranges(toy(tmp_path/'a.onnx'), np.zeros((1, 1, 64, 64), np.float32), 'percentile', percent=10)
