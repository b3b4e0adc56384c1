"""How well vectors find what people judged relevant: recall, nDCG and MRR."""
import pathlib
import re

import numpy as np

from lean_jax.errors import InputError
from lean_jax.nn.pooling import Pooling


def metrics(ranked, judged, *, cuts=(10, 100)):
  """The means over queries with a relevant document.

  recall@k: of the relevant documents, those among the first k. nDCG@k (Järvelin & Kekäläinen 2002,
  as trec_eval has it): sum of gain / log2(1 + rank), over that of the best order. MRR@k: one over
  the rank of the first relevant document, 0 beyond k.

  Args:
    ranked: {query: documents, the best first, each once}.
    judged: {query: {document: gain}}; above 0 is relevant, what is not there is not.
    cuts: recall is at each, nDCG and MRR at the first.

  Returns:
    {'recall@10': ..., 'recall@100': ..., 'ndcg@10': ..., 'mrr@10': ..., 'queries': how many}.

  Raises:
    InputError: no query has a relevant document, or one that was judged is not ranked.
  """
  rows, k = [], cuts[0]
  for query, gains in judged.items():
    good = {d: g for d, g in gains.items() if g > 0}
    if not good:
      continue
    if query not in ranked:
      raise InputError(f'query {query!r} was judged and not ranked; rank documents for it')
    found = np.array([good.get(d, 0) for d in ranked[query][:max(cuts)]], float)
    best = np.array(sorted(good.values(), reverse=True)[:k], float)
    first = np.flatnonzero(found[:k])
    rows.append([np.count_nonzero(found[:cut]) / len(good) for cut in cuts]
                + [_dcg(found[:k]) / _dcg(best), 1 / (1 + first[0]) if len(first) else 0.])
  if not rows:
    raise InputError('no query has a relevant document; give judgements above 0')
  names = [f'recall@{cut}' for cut in cuts] + [f'ndcg@{k}', f'mrr@{k}']
  return dict(zip(names, np.mean(rows, axis=0).tolist())) | dict(queries=len(rows))


def _dcg(gains):
  return float(np.sum(gains / np.log2(2 + np.arange(len(gains)))))


def ranked_by_vectors(queries, documents, most):
  """The numbers of the `most` documents nearest to each query, [Q most], the nearest first.

  Args:
    queries: [Q D]; documents: [N D]; compared by their products. Equal ones stay in order.
  """
  scores = queries.astype(np.float32) @ documents.astype(np.float32).T
  return np.argsort(-scores, axis=1, kind='stable')[:, :most]


def evaluate(model, queries, documents, judged, *, cuts=(10, 100), batch=32, truncate=True):
  """`metrics` of a model's vectors: by cosine, or by product where it does not normalise them.

  Args:
    model: a `lean_jax.Model` that embeds.
    queries, documents: {id: text}.
    judged: {query: {document: gain}}.
    cuts, batch: of `metrics` and `embed`.
    truncate: whether the end of a text that is too long is left out.

  Raises:
    InputError: a judged query or document that is not there.
  """
  for query, gains in judged.items():
    odd = [query] if query not in queries else [d for d in gains if d not in documents]
    if odd:
      raise InputError(f'judged of query {query!r}: {odd[0]!r} is not among the texts; give it, or '
                       'leave its judgement out')
  names, asked = list(documents), [q for q in queries if q in judged]
  embed = lambda texts: model.embed(texts, batch=batch, truncate=truncate)
  places = ranked_by_vectors(embed([queries[q] for q in asked]), embed(list(documents.values())),
                             max(cuts))
  ranked = {q: [names[k] for k in row] for q, row in zip(asked, places)}
  return metrics(ranked, judged, cuts=cuts)


def cranfield(folder):
  """Queries, documents and judgements of the Cranfield collection, as SMART distributes it.

  Judgements number the queries by their order, and a document is relevant (gain 1) by any grade
  from 1 to 4: which end of the grades is the better one, its copies disagree on.

  Args:
    folder: has cran.all.1400, cran.qry and cranqrel.

  Raises:
    InputError: a file is absent or of another form.
  """
  read = lambda name: pathlib.Path(folder, name).read_text(encoding='latin-1')
  try:
    documents = {id: ' '.join(f'{fields.get("T", "")} {_body(fields)}'.split())
                 for id, fields in _records(read('cran.all.1400'))}
    queries = {str(k): ' '.join(fields['W'].split())
               for k, (_, fields) in enumerate(_records(read('cran.qry')), 1)}
    judged = {}
    for line in read('cranqrel').splitlines():
      if line.strip():
        query, document, grade = line.split()[:3]
        if 1 <= int(grade) <= 4:
          judged.setdefault(query, {})[document] = 1
  except (OSError, KeyError, ValueError) as error:
    raise InputError(f'{str(folder)!r} is not the Cranfield collection ({error!r}); give the '
                     'folder of cran.all.1400, cran.qry and cranqrel') from error
  documents = {id: text for id, text in documents.items() if text}
  return queries, documents, {q: {d: g for d, g in own.items() if d in documents}
                              for q, own in judged.items()}


def _records(text):
  """[(id, {field: text})] of lines '.I id', '.W' and what follows."""
  for record in re.split(r'^\.I ', text, flags=re.MULTILINE)[1:]:
    id, *fields = re.split(r'^\.([A-Z])\s*$', record, flags=re.MULTILINE)
    yield id.strip().lstrip('0'), dict(zip(fields[::2], fields[1::2]))


def _body(fields):
  """An abstract without the title that it begins with."""
  title, body = (' '.join(fields.get(name, '').split()) for name in 'TW')
  return body.removeprefix(title)


def pooling_of(config):
  """The `Pooling` of a model that embeds: its own, or the mean."""
  return getattr(config, 'encoder', config).pooling or Pooling()
