"""GGUF files made byte by byte, without our own code and without the format's package."""
import math
import struct

import numpy as np

F32, Q4_0, Q4_K, Q6_K = 0, 2, 12, 14
SIZES = {F32: (1, 4), Q4_0: (32, 18), Q4_K: (256, 144), Q6_K: (256, 210)}

TOKENS = ['<unk>', '<s>', '</s>', '\u2581', 'a', 'b', '\u2581a', 'ab', '\u2581ab', 'c', 'd', 'e']


def text(value):
  return struct.pack('<Q', len(value.encode())) + value.encode()


def typed(value):
  """A value with its type before it."""
  if isinstance(value, bool):
    return struct.pack('<I?', 7, value)
  if isinstance(value, int):
    return struct.pack('<II', 4, value)
  if isinstance(value, float):
    return struct.pack('<If', 6, value)
  if isinstance(value, str):
    return struct.pack('<I', 8) + text(value)
  kind, each = next((k, e) for of, k, e in (
      (str, 8, text), (float, 6, lambda v: struct.pack('<f', v)),
      (int, 5, lambda v: struct.pack('<i', v))) if isinstance(value[0], of))
  return struct.pack('<IIQ', 9, kind, len(value)) + b''.join(map(each, value))


def file_of(keys, tensors, version=3):
  """The bytes of a file.

  Args:
    keys: {name: value}.
    tensors: {name: (shape, type, bytes)}.
  """
  head = b'GGUF' + struct.pack('<IQQ', version, len(tensors), len(keys))
  head += b''.join(text(name) + typed(value) for name, value in keys.items())
  body = b''
  for name, (shape, kind, data) in tensors.items():
    head += text(name) + struct.pack(f'<I{len(shape)}Q', len(shape), *shape[::-1])
    head += struct.pack('<IQ', kind, len(body))
    body += data + bytes(-len(data) % 32)
  return head + bytes(-len(head) % 32) + body


def llama_keys(tokens, width=256, layers=2, hidden=256, heads=4, groups=2):
  """The keys of a small Llama and of SentencePiece's tokenizer of `tokens`."""
  of = {'context_length': 64, 'embedding_length': width, 'block_count': layers,
        'feed_forward_length': hidden, 'attention.head_count': heads,
        'attention.head_count_kv': groups, 'attention.layer_norm_rms_epsilon': 1e-5}
  types = [2, 3, 3, *[1] * (len(tokens) - 3)]
  return {'general.architecture': 'llama', **{f'llama.{k}': v for k, v in of.items()},
          'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.tokens': tokens,
          'tokenizer.ggml.scores': [-float(k) for k in range(len(tokens))],
          'tokenizer.ggml.token_type': types, 'tokenizer.ggml.bos_token_id': 1,
          'tokenizer.ggml.eos_token_id': 2}


def llama_tensors(vocabulary, kind_of, width=256, layers=2, hidden=256, kv=128):
  """{name: (shape, type, bytes)} of a small Llama with a tied head; `kind_of` a matrix its type."""
  layer = dict(attn_q=(width, width), attn_k=(kv, width), attn_v=(kv, width),
               attn_output=(width, width), ffn_gate=(hidden, width), ffn_up=(hidden, width),
               ffn_down=(width, hidden), attn_norm=(width,), ffn_norm=(width,))
  shapes = {'token_embd.weight': (vocabulary, width), 'output_norm.weight': (width,)} | {
      f'blk.{k}.{name}.weight': s for k in range(layers) for name, s in layer.items()}
  rng = np.random.default_rng(0)
  return {name: (shape, kind := F32 if len(shape) == 1 else kind_of(name),
                 blocks(rng, math.prod(shape), kind)) for name, shape in shapes.items()}


def blocks(rng, count, kind):
  """The bytes of `count` numbers of a type, their scales small."""
  if kind == F32:
    return (1 + .1 * rng.normal(size=count)).astype('<f4').tobytes()
  block, size = SIZES[kind]
  raw = rng.integers(0, 256, (count // block, size), dtype=np.uint8)
  for at in {Q4_0: (0,), Q4_K: (0, 2), Q6_K: (208,)}[kind]:
    scale = .002 * rng.uniform(.5, 1., size=(len(raw), 1)) * (1 if kind != Q4_0 else 10)
    raw[:, at:at + 2] = scale.astype('<f2').view(np.uint8)
  return raw.tobytes()


def small(width=32):
  """A file of a Llama in blocks of 32."""
  return (llama_keys(TOKENS, width=width, hidden=64),
          llama_tensors(len(TOKENS), lambda name: Q4_0, width=width, hidden=64, kv=width // 2))
