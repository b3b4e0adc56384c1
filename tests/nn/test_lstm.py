"""LSTM: its definition, its state, its padding, and PyTorch's own."""
import jax
import numpy as np
import pytest

from lean_jax.models.frame import Frame
from lean_jax.nn.lstm import LSTMOptions
from tests.nn import recurrent

CONFIG = recurrent.config_of('lstm', lstm=LSTMOptions(inner=11))


def reference(config, p, x):
  """The equations of the file's head, in float64."""
  h = c = np.zeros(config.lstm.inner)
  ys = []
  for row in x:
    gates = np.einsum('d,dgi->gi', row, p['in']['kernel']) + p['bias']
    i, f, g, o = gates + np.einsum('j,jgi->gi', h, p['recurrent'])
    c = recurrent.sigmoid(f) * c + recurrent.sigmoid(i) * np.tanh(g)
    h = recurrent.sigmoid(o) * np.tanh(c)
    ys.append(h)
  return np.stack(ys) @ p['out']['kernel']


def test_it_is_its_equations():
  recurrent.check_reference(CONFIG, reference)


def test_pieces_are_the_whole():
  recurrent.check_pieces(CONFIG)


def test_gradients_are_those_of_a_token_at_a_time():
  recurrent.check_gradients(CONFIG)


def test_padding_is_as_if_it_were_not_there():
  recurrent.check_padding(CONFIG)


def test_it_works_in_a_stack():
  recurrent.check_decoder(CONFIG)


def test_its_gates_are_in_the_order_of_pytorch():
  torch = pytest.importorskip('torch')
  module, params = recurrent.mixer(CONFIG)
  p = recurrent.plain(params)
  theirs = torch.nn.LSTM(recurrent.D, 11, batch_first=True, dtype=torch.float64)
  as_torch = lambda w: torch.tensor(w.reshape(len(w), -1).T.copy())
  with torch.no_grad():
    theirs.weight_ih_l0.copy_(as_torch(p['in']['kernel']))
    theirs.weight_hh_l0.copy_(as_torch(p['recurrent']))
    theirs.bias_ih_l0.copy_(torch.tensor(p['bias'].reshape(-1)))
    theirs.bias_hh_l0.zero_()
    want = theirs(torch.tensor(np.asarray(recurrent.inputs(), np.float64)))[0].numpy()
  got, _ = jax.jit(lambda x: module.apply({'params': params}, x, Frame(), None, None))(
      recurrent.inputs())
  np.testing.assert_allclose(got, want @ p['out']['kernel'], atol=1e-5)
