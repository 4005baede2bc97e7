"""A save, a file for each stage.

plan.py         who writes what, and where: once for a run; directories.py: which directory each piece goes to
write.py        one rank's files
saver.py        runs the stages, and training waits
async_saver.py  runs them beside training: staging.py copies into an arena.py, and a writer.py (writer_main.py) writes;
                equipment.py keeps these, in_flight.py is one rank's part of such a save, progress.py says how far it is
                memory_left.py whether there is room for that; reports.py what a writer tells rank 0
ending.py       how either ends: published, or abandoned
memory_disk.py  what was written, for somebody else to write for real
"""
