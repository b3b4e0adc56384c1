"""Several processes on the command line: the flags of `lean-jax run` that join them.

JAX is imported when a process joins, so that --help stays light.
"""
from lean_jax.errors import InputError

HEARTBEAT = 60                         # seconds, as of training.hosts


def add_arguments(parser):
  """The flags."""
  flag = parser.add_argument_group('several hosts (the same command on each)').add_argument
  flag('--hosts', metavar='N', help="how many processes; 'auto' where JAX finds them by itself: a "
       'TPU VM slice, SLURM, Open MPI')
  flag('--coordinator', metavar='ADDRESS:PORT', help='of the first process, with a number of hosts')
  flag('--host', type=int, metavar='K', help='the number of this one, from 0, with a number of '
       'hosts')
  flag('--heartbeat', type=int, default=HEARTBEAT, metavar='S', help='seconds after which a silent '
       'host is given up, and all stop (%(default)s)')


def start(arguments):
  """Joins the processes that the flags speak of; none if they speak of none.

  Raises:
    InputError: as of `training.hosts.start`.
  """
  if arguments.hosts is None:
    if arguments.coordinator is not None or arguments.host is not None:
      raise InputError('--coordinator or --host without --hosts; say how many there are')
    return
  if arguments.hosts != 'auto' and not (arguments.hosts.isdecimal() and int(arguments.hosts)):
    raise InputError(f"--hosts {arguments.hosts!r}; expected a number, or 'auto'")
  from lean_jax.training import hosts
  count = arguments.hosts if arguments.hosts == 'auto' else int(arguments.hosts)
  hosts.start(count, coordinator=arguments.coordinator, host=arguments.host,
              heartbeat=arguments.heartbeat)
