"""Laws, oracles and small models that tests of kvtier and of its plug-ins share."""
