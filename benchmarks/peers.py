"""Products of other libraries with weights of few bits on a CPU, for `kernels.py`.

Each function takes the weight [K N], how many copies of it are made, and how many threads are used;
it gives {name: one function of activations [M K] a copy}, or nothing where the library is not
installed.
"""
import ctypes
import pathlib

import numpy as np

_F32, _Q4_0, _Q4_K = 0, 2, 12                            # of ggml's enumeration of types
_ARENA = 8 << 20                                         # bytes of a graph's tensors without data


def torch(w, copies, threads):
  """PyTorch's dynamic 8-bit product: activations rounded as they come."""
  try:
    import torch
  except ImportError:
    return {}
  torch.set_num_threads(threads)

  def one():
    layer = torch.nn.Linear(*w.shape, bias=False)
    layer.weight.data = torch.from_numpy(np.array(w).T.copy())
    layer = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer))
    return lambda x: layer(torch.from_numpy(x))
  return {f'torch {torch.__version__} dynamic int8': [one() for _ in range(copies)]}


def onnx(w, copies, threads):
  """ONNX Runtime's dynamic 8-bit product (DynamicQuantizeMatMul), a scale a column."""
  try:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
  except ImportError:
    return {}
  scale = np.abs(w).max(0) / 127
  codes = np.rint(w / scale).astype(np.int8)
  node = helper.make_node('DynamicQuantizeMatMul', ['x', 'w', 's', 'z'], ['y'],
                          domain='com.microsoft')
  floats = lambda name, n: helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, n])
  graph = helper.make_graph(
      [node], 'product', [floats('x', w.shape[0])], [floats('y', w.shape[1])],
      [numpy_helper.from_array(codes, 'w'), numpy_helper.from_array(scale.astype(np.float32), 's'),
       numpy_helper.from_array(np.zeros(w.shape[1], np.int8), 'z')])
  model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17),
                                                  helper.make_opsetid('com.microsoft', 1)])
  model.ir_version = 8
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads

  def one():
    session = onnxruntime.InferenceSession(model.SerializeToString(), options,
                                           providers=['CPUExecutionProvider'])
    return lambda x: session.run(None, {'x': x})
  return {f'ONNX Runtime {onnxruntime.__version__} dynamic int8': [one() for _ in range(copies)]}


def ggml(w, copies, threads):
  """ggml's Q4_K and Q4_0, in the layout of its files and in those that it makes of them.

  Raises:
    RuntimeError: a product is not that of the weight.
  """
  try:
    import xllamacpp
  except ImportError:
    return {}
  library = ctypes.CDLL(str(next(pathlib.Path(xllamacpp.__file__).parent.glob('*.so'))))
  forms = {}
  for name, kind in (('Q4_K', _Q4_K), ('Q4_0', _Q4_0)):
    for layout, buffers in _Ggml.buffers(library).items():
      try:
        made = [_Ggml(library, w, kind, buffers, threads) for _ in range(copies)]
      except RuntimeError:                               # ggml has no such product of the type
        continue
      x = np.random.default_rng(0).normal(size=(4, w.shape[0])).astype(np.float32)
      close = np.corrcoef(made[0](x).ravel(), (x @ w).ravel())[0, 1]
      if not close > .98:
        raise RuntimeError(f'ggml {name} {layout}: correlation {close} with the product')
      forms[f'ggml {name}, {layout}'] = made
  return forms


class _Ggml:
  """One weight in a buffer of ggml's, and a graph for each number of rows."""

  @staticmethod
  def buffers(library):
    """{name: type of buffer}: of plain memory, and those in which ggml lays weights out anew."""
    call = lambda name, *a, result=ctypes.c_void_p: _call(library, name, *a, result=result)
    device = call('ggml_backend_dev_by_type', ctypes.c_int(0))
    found = {'as saved': call('ggml_backend_cpu_buffer_type')}
    registry = call('ggml_backend_dev_backend_reg', device)
    more = call('ggml_backend_reg_get_proc_address', registry, b'ggml_backend_dev_get_extra_bufts')
    if more:
      each = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(more)(device)
      for k in range(8):
        if not each[k]:
          break
        name = call('ggml_backend_buft_name', ctypes.c_void_p(each[k]), result=ctypes.c_char_p)
        found[name.decode()] = ctypes.c_void_p(each[k])
    return found

  def __init__(self, library, w, kind, buffers, threads):
    self.call = lambda name, *a, result=ctypes.c_void_p: _call(library, name, *a, result=result)
    self.rows, self.columns = w.shape
    self.backend = self.call('ggml_backend_cpu_init')
    self.call('ggml_backend_cpu_set_n_threads', self.backend, ctypes.c_int(threads), result=None)
    arena = self._arena()
    self.weight = self.call('ggml_new_tensor_2d', arena, ctypes.c_int(kind),
                            ctypes.c_int64(self.rows), ctypes.c_int64(self.columns))
    buffer = self.call('ggml_backend_alloc_ctx_tensors_from_buft', arena, buffers)
    size = self.call('ggml_nbytes', self.weight, result=ctypes.c_size_t)
    codes, floats = ctypes.create_string_buffer(size), np.ascontiguousarray(w.T, np.float32)
    self.call('ggml_quantize_chunk', ctypes.c_int(kind), ctypes.c_void_p(floats.ctypes.data), codes,
              ctypes.c_int64(0), ctypes.c_int64(self.columns), ctypes.c_int64(self.rows), None,
              result=ctypes.c_size_t)
    self.call('ggml_backend_buffer_set_usage', buffer, ctypes.c_int(1), result=None)   # weights
    self.graphs = {}
    *_, graph = self._graph(1)
    node = self.call('ggml_graph_node', graph, ctypes.c_int(0))
    if not self.call('ggml_backend_dev_supports_op',
                     self.call('ggml_backend_dev_by_type', ctypes.c_int(0)), node,
                     result=ctypes.c_bool):
      raise RuntimeError('no such product')
    self.call('ggml_backend_tensor_set', self.weight, codes, ctypes.c_size_t(0),
              ctypes.c_size_t(size), result=None)

  def _arena(self):
    class Parameters(ctypes.Structure):
      _fields_ = [('size', ctypes.c_size_t), ('memory', ctypes.c_void_p), ('bare', ctypes.c_bool)]
    return self.call('ggml_init', Parameters(_ARENA, None, True))

  def _graph(self, rows):
    if rows not in self.graphs:
      arena = self._arena()
      x = self.call('ggml_new_tensor_2d', arena, ctypes.c_int(_F32), ctypes.c_int64(self.rows),
                    ctypes.c_int64(rows))
      y = self.call('ggml_mul_mat', arena, self.weight, x)
      graph = self.call('ggml_new_graph', arena)
      self.call('ggml_build_forward_expand', graph, y, result=None)
      self.call('ggml_backend_alloc_ctx_tensors', arena, self.backend)
      self.graphs[rows] = x, y, graph
    return self.graphs[rows]

  def __call__(self, x):
    given, y, graph = self._graph(len(x))
    self.call('ggml_backend_tensor_set', given, ctypes.c_void_p(x.ctypes.data), ctypes.c_size_t(0),
              ctypes.c_size_t(x.nbytes), result=None)
    self.call('ggml_backend_graph_compute', self.backend, graph, result=ctypes.c_int)
    out = np.empty((len(x), self.columns), np.float32)
    self.call('ggml_backend_tensor_get', y, ctypes.c_void_p(out.ctypes.data), ctypes.c_size_t(0),
              ctypes.c_size_t(out.nbytes), result=None)
    return out


def _call(library, name, *arguments, result):
  function = getattr(library, name)
  function.restype = result
  given = [ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments]
  return function(*given)
