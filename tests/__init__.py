import os

# Before torch is imported: threads that wait are to sleep. On few cores, those that spin look like a hang.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
