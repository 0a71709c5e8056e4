import os

# Set before torch is imported: threads that wait should sleep. On few cores, threads that spin look like a hang.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
