"""Published claims, run again at desk scale with the control arm that was missing."""
