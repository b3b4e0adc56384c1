"""The ids that a model writes after prompts, or of sources."""
from lean_jax.errors import InputError
from lean_jax.generation.prompts import checked_prompts, several
from lean_jax.generation.sampling import checked
from lean_jax.generation.writer import Writer


def generate(module, params, prompt_ids, *, tokens, temperature=0., top_k=None, top_p=None,
             min_p=None, repetition_penalty=None, eos=None, key=None, n=1, draft=None,
             ahead=4, cache=None):
  """The ids that follow prompts; of an encoder and a decoder, the targets of sources.

  Args:
    module: a decoder: `hidden`, `logits` and a config with a context and a vocabulary; or an
      encoder and a decoder, which has `encode` too.
    params: its parameters, of any kinds of weights.
    prompt_ids: [T], [B T], or a list of such [T] of any lengths; BOS included where the model wants
      it. Of an encoder and a decoder the sources, with the tokens that end them.
    tokens: how many at most, 1 or more.
    temperature, top_k, top_p, min_p, repetition_penalty: see `sampling.Sampling`; temperature 0
      takes the most probable token.
    eos: the id, or ids, that end a text; None writes all tokens.
    key: a jax PRNG key; needed above temperature 0. A row's tokens depend on it, the row's number
      and the row's prompt, not on the other rows (but where frequencies of positions depend on the
      length, the longest row decides).
    n: texts of each prompt.
    draft: (module, params) of a smaller decoder with the same tokens, which proposes `ahead` tokens
      at a time: see `speculative`.
    cache: how keys and values are kept: 'float' (None), 'int8' or 'int4', in groups of 32 places,
      see `nn.rounded`. Of a batch of different lengths the longest prompt says where groups begin.

  Returns:
    int32 [t], of several prompts [B t], t <= tokens, without the prompt, or without the target's
    start token; for n > 1 [n t] and [B n t]. A text ends with its end token; rows that end early
    are filled up with it.

  Raises:
    InputError: an argument that is out of its range, more tokens than the context has, or a cache
      that the model cannot have.
  """
  prompts = checked_prompts(prompt_ids, module.config.vocabulary)
  sampling = checked(temperature, top_k, top_p, min_p, repetition_penalty)
  if temperature > 0 and key is None:
    raise InputError(f'temperature {temperature} samples, which needs randomness; give a key, '
                     'jax.random.key(seed)')
  check_copies(n, temperature)
  writer = Writer(module, params, prompts, tokens=tokens, sampling=sampling, key=key, copies=n,
                  ends=() if eos is None else eos, draft=draft, ahead=ahead, cache=cache)
  writer.advance()
  out = writer.ids()
  out = out.reshape(len(prompts), n, -1) if n > 1 else out
  return out if several(prompt_ids) else out[0]


def check_copies(n, temperature):
  """Raises InputError where n texts of a prompt make no sense."""
  if n < 1 or n != int(n):
    raise InputError(f'n {n} texts of a prompt; give a whole number, 1 or more')
  if n > 1 and temperature == 0:
    raise InputError(f'n {n} texts at temperature 0 are {n} times the same; give a temperature '
                     'above 0')
