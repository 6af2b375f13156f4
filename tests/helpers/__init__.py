"""Cases, oracles and runners that test modules share; no test is in here."""
