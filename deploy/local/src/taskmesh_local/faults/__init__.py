"""The fault campaign: a mesh under load whose parts are killed, stopped and cut off, and what must hold in the end."""
