"""What a model shows of its insides when asked: collections that a call makes mutable.

`module.apply(variables, tokens, mutable=['taps'])` gives the collection beside the outputs. What is
not asked for is not computed, and the compiled program is the one without it. A call with a cache
shows states alone.
"""

STATES = 'taps'               # 'embedding' and each layer's 'hidden', [B T D]; a router's choices
HEADS = 'taps_heads'          # 'queries' [B T H K], 'keys' [B T G K], 'values' [B T G W]
SCORES = 'taps_scores'        # 'scores' [B H T S] of attention, before the softmax
TAPS = (STATES, HEADS, SCORES)


def asked(module, collection):
  """Whether a call wants what is in a collection; making parameters wants nothing."""
  return module.is_mutable_collection(collection) and not module.is_initializing()
