"""What a worked solution says in the end, and whether that is right."""
import decimal
import re

from lean_jax.errors import InputError

MARK = '####'                 # before GSM8K's answers
_NUMBER = re.compile(r'\$?[-+]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)')


def final_number(text):
  """The number after the last '####' of a text, normalised; None where there is none.

  Cobbe et al. 2021 (GSM8K, arXiv:2110.14168) end each solution so. Signs of currency, commas in
  thousands, units after it and zeros at its end are not part of it: '#### $1,200.50 a month' is
  '1200.5'.
  """
  _, mark, end = text.rpartition(MARK)
  line = end.strip().split('\n')[0].replace('\N{MINUS SIGN}', '-')
  found = _NUMBER.search(line) if mark else None
  if found is None:
    return None
  value = decimal.Decimal(re.sub('[$,]', '', found.group()))
  return format(value.normalize(), 'f') if value else '0'


def gsm8k(completion, reference) -> bool:
  """Whether a solution ends with the number of the reference's solution.

  Raises:
    InputError: the reference has none.
  """
  wanted = final_number(reference)
  if wanted is None:
    raise InputError(f"the reference {reference!r} has no number after '{MARK}'; give GSM8K's "
                     'answers, or another check')
  return final_number(completion) == wanted
