"""LSTM language models, ours: a student for small devices, with no checkpoints but our own.

Layers are residual and normalised as a transformer's are: x + LSTM(norm(x)), and if
intermediate_size is a number, x + MLP(norm(x)). Tensors have the names, the shapes and the order of
gates of torch.nn.LSTM, of whose two biases the second is zero and not stored.
"""
from lean_jax.models.config import Layer
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families import llama
from lean_jax.models.families.base import (
  ACTIVATIONS,
  Family,
  Stored,
  activation_name,
  chosen,
  given,
  linear,
  positive,
  require,
)
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.lstm import LSTMOptions
from lean_jax.nn.mlp import MLPOptions

DEFAULTS = dict(intermediate_size=None, hidden_act='silu', rms_norm_eps=1e-5,
                max_position_embeddings=2048, tie_word_embeddings=True)


def from_hf(hf):
  """The config of config.json."""
  require(hf, {})
  hf = DEFAULTS | hf
  layers, hidden = positive(hf, 'num_hidden_layers'), given(hf, 'intermediate_size', 0)
  return DecoderConfig(
      vocabulary=positive(hf, 'vocab_size'), width=positive(hf, 'hidden_size'), layers=layers,
      hidden=hidden, context=positive(hf, 'max_position_embeddings'),
      kinds=(Layer(mixer='lstm', feed_forward='mlp' if hidden else None),) * layers,
      attention=AttentionOptions(ropes=()), lstm=LSTMOptions(inner=positive(hf, 'lstm_size')),
      mlp=MLPOptions(activation=chosen(hf, 'hidden_act', ACTIVATIONS)),
      epsilon=positive(hf, 'rms_norm_eps', float), tied=bool(hf['tie_word_embeddings']))


def to_hf(c):
  """config.json of a config."""
  return dict(
      architectures=['LeanLSTMForCausalLM'], model_type='lean_lstm', vocab_size=c.vocabulary,
      hidden_size=c.width, num_hidden_layers=c.layers, lstm_size=c.lstm.inner,
      intermediate_size=c.hidden or None, hidden_act=activation_name(c.mlp.activation),
      max_position_embeddings=c.context, rms_norm_eps=c.epsilon, tie_word_embeddings=c.tied)


def names(c):
  """Where a checkpoint has each array."""
  layer, I = 'model.layers.{layer}.lstm.', c.lstm.inner
  gates = lambda name, inputs: Stored(f'{layer}{name}', permute=(1, 0), shape=(4 * I, inputs))
  return llama.names(c) | {
      'layers/lstm/in/kernel': gates('weight_ih_l0', c.width),
      'layers/lstm/recurrent': gates('weight_hh_l0', I),
      'layers/lstm/bias': Stored(f'{layer}bias_ih_l0', shape=(4 * I,)),
      'layers/lstm/out/kernel': linear('model.layers.{layer}.out_proj.weight')}


LEAN_LSTM = Family('lean_lstm', from_hf, to_hf, names, prefix='model.')
