"""What a program changes beside weights, and what of it goes on after a resume.

Where it looks is in :mod:`nemologger.exact.reach`. Of a module and a data module:

    attributes.py        counters, lists and arrays among their attributes; kept.py: what is kept of them
    holders.py           the objects that have such attributes
    records.py           lists of which is only noted, and those that decide; uses.py: what the code does with them
    own_states.py        objects with a state_dict() that no checkpoint holds
    apart.py             networks that Lightning does not see
    functions.py         what schedules keep; inner_optimizers.py: optimizers within others
    built.py             what optimizers and schedules are made with
    settings.py          modes, and what is trained
    swapped.py           functions and objects in the place of others: members of enumerations go on, others are named
    strangers.py         objects of libraries, which are named

Of a dataset and a sampler:

    owned.py             generators, counters, lists and arrays
    crowds.py            numbers in long lists of objects
    caches.py            dictionaries that are only added to

Of both:

    generators.py        the states of generators
    flags.py             what says that something was made, and is of no use without it
"""
