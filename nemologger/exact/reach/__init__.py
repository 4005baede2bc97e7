"""What can be reached from an object of a program: what it holds, and what its code names.

walk.py              all that can be reached from some objects; look.py: at one moment; paths.py: where that is
kinds.py             what is known of a class
parts.py             what one object holds, by name
crowd.py             long lists of objects
objects.py           which objects are the program's own
hooks.py             what is hooked into modules and parameters
code.py              what code sets, fills and names; mentioned.py: what is named there in turn
variables.py         what code keeps in variables of closures, files and classes
configs.py           configurations of OmegaConf, and hyperparameters
optimizers.py        what an optimizer keeps beside its state
views.py             what is no object, or not to be seen whole, looked at as one: these three
"""
