"""What is learned, and the one definition of a score. Imports neither `training` nor `service`."""
