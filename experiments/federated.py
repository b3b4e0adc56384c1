r"""Clients that share only what they predict on public text learn what none reads alone.

Li & Wang 2019 (FedMD, arXiv:1910.03581), table 1: clients of different architectures gain by what
others say on public data, though nobody shows weights or text.

python -m lean_jax.experiments.federated FOLDER --data DATA [--rounds N] [--steps N] [--seeds N]

Three processes, a transformer, a Mamba and an LSTM over one byte-level tokenizer; DATA has
tinystories/, tinyshakespeare/ and wikitext-2/, one the private text of each; public are other parts
of all three. Alone is the same client with the same steps on its own text, and nothing else.
Everything made goes to FOLDER. Ends with exit code 1 where a claim fails.
"""
import argparse
import json
import multiprocessing
import pathlib
import sys

import lean_jax as lean
from lean_jax.data.tokenizer import train_bpe
from lean_jax.files import write_text
from lean_jax.pipeline.on_text import told

WINDOW, BATCH, PEAK = 64, 16, 3e-3
MODELS = dict(
    transformer=('llama', dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                               intermediate_size=128)),
    mamba=('mamba', dict(hidden_size=64, num_hidden_layers=2, state_size=8)),
    lstm=('lean_lstm', dict(hidden_size=64, num_hidden_layers=1, lstm_size=96)))


def run_client(model, folder, name, own, public, workdir, settings):
  """A process: a client from a saved model, its last model saved beside its work."""
  learned = lean.federated_client(lean.load(model), folder, name, own, public, workdir=workdir,
                                  **settings)
  lean.save(learned, pathlib.Path(workdir, 'last'), overwrite=True)


def run_all(folder, clients, public, *, rounds, windows, window, timeout=600., top=None,
            **settings):
  """Server and clients, each client in a process of its own; their last models by name.

  Args:
    clients: {name: (its first model, a folder; its own text)}.
    settings: of `lean.federated_client`.
  """
  folder, shared = pathlib.Path(folder), pathlib.Path(folder, 'shared')
  spawn = multiprocessing.get_context('spawn')
  works = [spawn.Process(target=run_client, args=(
      str(model), str(shared), name, str(own), str(public), str(folder / name),
      dict(settings, window=window, timeout=timeout)))
      for name, (model, own) in clients.items()]
  for process in works:
    process.start()
  try:
    lean.federated_server(shared, list(clients), public, lean.load(next(iter(clients.values()))[0]),
                          rounds=rounds, windows=windows, window=window, timeout=timeout, top=top)
    for process in works:
      process.join()
  finally:
    for process in works:
      process.kill()
  failed = [name for name, process in zip(clients, works) if process.exitcode != 0]
  if failed:
    raise lean.LeanError(f'{", ".join(failed)} did not end well')
  return {name: lean.load(folder / name / 'last') for name in clients}


def texts(data, folder):
  """Writes each client's own text, the public one and a test; returns {name: path}."""
  stories = [json.loads(line)['text'] for line in (data / 'tinystories' / 'stories.jsonl').open()]
  whole = ['\n'.join(stories), (data / 'tinyshakespeare' / 'input.txt').read_text(),
           (data / 'wikitext-2' / 'train.txt').read_text()]
  cut = lambda first, size: [text[first:first + size] for text in whole]
  out = {}
  for name, text in [*zip(MODELS, cut(0, 200_000)), ('public', '\n'.join(cut(300_000, 60_000))),
                     ('test', '\n'.join(cut(500_000, 20_000)))]:
    out[name] = folder / f'{name}.txt'
    write_text(out[name], text)
  return out


def measured(folder, data, *, rounds, steps, seed):
  """{client: nats a token of the test text, alone and federated}."""
  at = texts(data, folder)
  tokenizer, clients, found = train_bpe([at['public'].read_text()], 512), {}, {}
  for k, (name, (kind, settings)) in enumerate(MODELS.items()):
    if not (folder / f'{name}-start').exists():
      lean.save(lean.create(kind, tokenizer, seed=10 * seed + k, max_position_embeddings=WINDOW,
                            **settings), folder / f'{name}-start')
    clients[name] = (folder / f'{name}-start', at[name])
  models = run_all(folder, clients, at['public'], rounds=rounds, windows=192, window=WINDOW, top=32,
                   revisit=steps, digest=steps, batch=BATCH, peak=PEAK, seed=seed)
  nll = lambda model: lean.evaluate(model, at['test'], window=WINDOW)['nll']
  for name, (start, own) in clients.items():
    alone = lean.train(lean.load(start), own, steps=rounds * steps, batch=BATCH, window=WINDOW,
                       peak=PEAK, seed=seed)
    found[name] = dict(alone=nll(alone), federated=nll(models[name]))
  return found


def claims(found):
  """[(claim, whether it holds)], of figures by seed."""
  out = []
  for name in MODELS:
    pairs = [(one[name]['federated'], one[name]['alone']) for one in found.values()]
    text = ', '.join(f'{a:.3f} against {b:.3f}' for a, b in pairs)
    out.append((f'{name} knows text like all clients\' better than alone, each seed: {text} nats',
                all(a < b for a, b in pairs)))
  return out


def main(argv=None):
  """Prints figures and claims, and returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('folder', metavar='FOLDER', type=pathlib.Path, help='of all that is made')
  parser.add_argument('--data', required=True, type=pathlib.Path)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=60, help='of a phase (%(default)s)')
  parser.add_argument('--seeds', type=int, default=3)
  a = parser.parse_args(argv)
  found = {}
  for seed in range(a.seeds):
    folder = a.folder / f'seed-{seed}'
    folder.mkdir(parents=True, exist_ok=True)
    found[f'seed {seed}'] = measured(folder, a.data, rounds=a.rounds, steps=a.steps, seed=seed)
  return told(found, claims(found))


if __name__ == '__main__':
  sys.exit(main())
