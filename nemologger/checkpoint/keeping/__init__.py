"""What a run keeps.

keeper.py     saves, and keeps what is to be kept
decision.py   what a save writes, and naming.py: what it is called
last_link.py  what -last is: hard links, a symbolic link, or a copy
shelf.py      what a callback keeps in a directory, where retention.py says what may go
remover.py    takes it away beside training, or thinning.py only its optimizer's state; errand.py: what is done so
"""
