"""What fine-tuning by examples is made of: its methods, and the rows they learn from."""
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from lean_jax import tree
from lean_jax.adapters.bitfit import BIASES
from lean_jax.data import source_windows
from lean_jax.data.example_windows import ExampleWindows, arranged
from lean_jax.data.examples import read_examples
from lean_jax.data.packed import check_reads_text
from lean_jax.data.source_windows import SourceWindows
from lean_jax.errors import InputError
from lean_jax.weights import Adapter, Quantized, bare
from lean_jax.weights.beside import is_beside

QLORA = 'nf4-g64-dq'          # Dettmers et al. 2023 (arXiv:2305.14314), section 3


class Tuning(NamedTuple):
  """A way to fine-tune.

  Attributes:
    attach: the adapter of `lean.attach` that it trains; None trains what is there.
    peak: its usual learning rate.
    settings: of the adapter, where nothing else is said.
    trainable: a pattern of the names of what trains; None is the adapters.
  """
  attach: str | None
  peak: float
  settings: Mapping[str, Any] = {}
  trainable: str | None = None


_LORA = dict(rank=8, alpha=16.)
# Rates: of LoRA and QLoRA as in table 9 of QLoRA; of IA3 section 3.3 of its paper; of BitFit within
# its paper's range; a full training's as is usual for models of billions.
TUNINGS = dict(
    qlora=Tuning('lora', 2e-4, _LORA), lora=Tuning('lora', 2e-4, _LORA),
    dora=Tuning('dora', 2e-4, _LORA), vera=Tuning('vera', 4e-3, dict(rank=64)),
    pissa=Tuning('pissa', 2e-4, dict(rank=8)), ia3=Tuning('ia3', 3e-3),
    houlsby=Tuning('houlsby', 1e-3), pfeiffer=Tuning('pfeiffer', 1e-3),
    parallel=Tuning('parallel', 1e-3), prefix=Tuning('prefix', 1e-3),
    p_tuning_v2=Tuning('p_tuning_v2', 1e-2), prompt=Tuning('prompt', 3e-2),
    bitfit=Tuning(None, 1e-3, trainable=BIASES), full=Tuning(None, 1e-5, trainable='.*'))


def tuning(method, params):
  """The Tuning of a name.

  Raises:
    InputError: there is none, or it does not fit the params: adapters are there already, there is
      nothing that it could train, or what it trains is rounded.
  """
  if method not in TUNINGS:
    raise InputError(f'no method {method!r}; there are: {", ".join(TUNINGS)}')
  found = jax.tree.leaves(params, is_leaf=tree.is_weight)
  if any(isinstance(w, Adapter) or is_beside(w) for w in found):
    raise InputError('the model has adapters already; merge them, or go on training them with '
                     'lean.train')
  if method == 'full' and is_rounded(params):
    raise InputError('full fine-tuning of rounded weights; give the float model, or method qlora')
  found = TUNINGS[method]
  if found.trainable is not None:
    tree.split(params, found.trainable)                # raises where nothing matches
  return found


def is_rounded(params):
  """Whether a model has integers for weights."""
  return any(isinstance(bare(w), Quantized) for w in tree.named_weights(params).values())


def example_windows(model, data, *, window=None, packing=None, template=None):
  """The ExampleWindows of data for a model; of an encoder and a decoder, the SourceWindows.

  Args:
    model: a `lean_jax.Model`.
    data: as `examples.read_examples` takes it, or `source_windows.read_pairs`; or such windows.
    window: tokens a row, or of a source and of a target each; None is the model's context, at most
      2048.
    packing: whether examples share rows; None where the model keeps them apart.
    template: of the chat, a name or Jinja.

  Raises:
    InputError: a model that writes no text, data that cannot be used, a window beyond the context,
      or packing for a model with a state or of sources.
  """
  if 'decoder_tokens' in model.module.inputs:
    return _source_windows(model, data, window, packing, template)
  check_reads_text(model)
  if isinstance(data, SourceWindows):
    raise InputError(f'sources and targets for a {model.family.model_type}, which goes on with a '
                     'text; give examples')
  if isinstance(data, ExampleWindows):
    return data
  stateful = sorted({l.mixer for l in model.config.each} - {'attention', 'latent'})
  if packing and stateful:
    raise InputError(f'packing for a {model.family.model_type}, whose {" and ".join(stateful)} '
                     'layers carry a state from one example into the next; leave packing out, and '
                     'examples are padded')
  window = _window(window, model.config.context)
  packing = not stateful if packing is None else packing
  return arranged(read_examples(data, model.tokenizer, template), window, packed=packing)


def _source_windows(model, data, window, packing, template):
  """The SourceWindows of data for an encoder and a decoder; args as of `example_windows`."""
  kind = model.family.model_type
  if isinstance(data, ExampleWindows):
    raise InputError(f'rows of texts for a {kind}, which writes a target of a source; give '
                     'instruction and output, or source and target')
  if packing:
    raise InputError(f'packing for a {kind}, whose encoder would mix the sources of a row; leave '
                     'packing out, and examples are padded')
  if template is not None:
    raise InputError(f'a chat template for a {kind}, whose source is no conversation; leave it out')
  if isinstance(data, SourceWindows):
    return data
  window = _window(window, min(model.config.encoder.context, model.config.context))
  return source_windows.arranged(source_windows.read_pairs(data, model.tokenizer), window,
                                 model.config.start)


def _window(window, context):
  """Tokens a row, of what is given or None, for a context."""
  window = min(context, 2048) if window is None else window
  if window > context:
    raise InputError(f'windows of {window} tokens are longer than the context of {context}; give '
                     'at most that')
  return window


def steps_of(windows, batch, epochs):
  """How many steps of a batch see every row `epochs` times."""
  if epochs <= 0:
    raise InputError(f'{epochs} epochs; give a number above 0, 1 sees every example once')
  return max(1, math.ceil(epochs * len(windows) / batch))
