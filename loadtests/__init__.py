"""Load on a running service, and what it shows. Nothing here is part of the installed packages."""
