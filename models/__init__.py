"""What is learned, and the one definition of a score. Imports neither `training` nor `service`."""

import os

# Read when torch is first imported. Threads that wait otherwise spin, and beside other work on the same cores two of
# them take several times as long; alone on a machine, sleeping costs a few per cent.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
