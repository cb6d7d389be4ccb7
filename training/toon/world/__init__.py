"""The world that the toon checkpoint is trained in: heads of which everything is known, at any size.

`identity` says who somebody is, `acting` how a face moves while it says something, `drawing` makes pictures of both.
"""
