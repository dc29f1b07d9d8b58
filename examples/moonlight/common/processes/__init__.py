"""One program as several processes: how they find each other, agree, and end together.

args       the flags, which any program can include
cluster    whether this process is one of a job that a cluster started
launcher   several processes of one command on this machine
start      the way into it, before any other call of JAX
together   a whole program: enter, agree on the options, work, leave
group      who am I, who writes, and how one waits for all
agreement  what all have in common: values of each, of the first, equal ones
watch      the end of one process ends the others, in a line
"""
