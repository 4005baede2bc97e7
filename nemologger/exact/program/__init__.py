"""What a program changes beside weights, and what of it goes on after a resume.

Of a module and a data module:

    attributes.py        counters, lists and arrays among their attributes; kept.py: what is kept of them
    holders.py           the objects that have such attributes
    records.py           lists of which is only noted, and those that decide; uses.py: what the code does with them
    own_states.py        objects with a state_dict() that no checkpoint holds
    apart.py             networks that Lightning does not see
    functions.py         what schedules and optimizers keep; inner_optimizers.py: optimizers within others
    settings.py          modes, and what is trained
    configs.py           configurations of OmegaConf, and hyperparameters
    swapped.py           functions and objects in the place of others: members of enumerations go on, others are named
    strangers.py         objects of libraries, which are named

Of a dataset and a sampler:

    owned.py             generators, counters, lists and arrays; look.py: what is within reach of one
    crowds.py            long lists of objects
    caches.py            dictionaries that are only added to

Of both, what may be looked into, and how:

    kinds.py             what is known of a class
    parts.py             what an object holds, by name
    objects.py           which objects are the program's own
    reach.py             what can be reached from some
    variables.py         what code keeps in variables of closures, files and classes; views.py: as if these were attributes
    code.py              what code sets, fills and names; mentioned.py: what is named there in turn
    generators.py        the states of generators
    flags.py             what says that something was made, and is of no use without it
    iterators.py         python's own iterators
"""
