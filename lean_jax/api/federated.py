"""Clients that learn from each other's predictions: see `distillation.federated`."""
import dataclasses
from collections.abc import Sequence

from lean_jax.api.model import Model, load, save
from lean_jax.data.batches import Batches
from lean_jax.data.packed import packed_windows
from lean_jax.distillation import federated
from lean_jax.training import recipe


def federated_server(folder, clients: Sequence[str], public, like: Model, *, rounds: int,
                     windows: int = 64, window: int = 64, field: str = 'text', **settings):
  """Averages what clients predict on public text, until all rounds are over.

  Args:
    folder: that server and clients write to; the same call goes on with what is there.
    clients: their names.
    public: text, as `train` takes it.
    like: a model of the clients' tokenizer; of its weights nothing is used.
    rounds: how many; windows: of public text in each; window: their tokens.
    settings: top, weights, seed and timeout of `distillation.federated.server`.
  """
  with packed_windows(public, 'all', like, window, field) as packed:
    told = packed.fingerprint, len(packed), packed.length
  federated.server(folder, clients, public=told, vocabulary=like.config.vocabulary, rounds=rounds,
                   windows=windows, **settings)


def federated_client(model: Model, folder, name: str, data, public, *, workdir, revisit: int,
                     digest: int, batch: int = 16, peak: float = 1e-3, window: int = 64,
                     seed: int = 0, timeout: float = 3600., field: str = 'text',
                     **settings) -> Model:
  """One client of federated distillation, in a process of its own: see `distillation.federated`.

  Args:
    model: where it starts; of any architecture.
    folder, public, window: as of the server; nothing else is shared, no weights and no text.
    name: of this client, one of the server's.
    data: this client's own text.
    workdir: this client's own folder; the same call goes on with what is there.
    revisit, digest: steps of a round on its own text, and on what all predict.
    settings: of `training.recipe.train`.
  """
  with packed_windows(data, 'all', model, window, field) as own, packed_windows(
      public, 'all', model, window, field) as packed:
    def train_on(model, batches, objective, steps, turn, at):
      batches = Batches(own, min(batch, len(own)), seed + turn) if batches is None else batches
      params, _ = recipe.train(model.module, model.params, batches, steps=steps, peak=peak,
                               seed=seed, folder=at, objective=objective, **settings)
      return dataclasses.replace(model, params=params)
    return federated.client(
        model, folder, name, train=train_on, save=save, load=load, public=packed, workdir=workdir,
        revisit=revisit, digest=digest, timeout=timeout)
