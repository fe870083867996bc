{
  "format": "id3pm-signature",
  "format_version": 1,
  "algorithm": "ed25519",
  "public_key": "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8",
  "signature": "d88e4666539700d0043dfa2efc503edd2161f20f949d513ebcfeb17ba46c7df8111b2b692d1424e2edd97f090b0d804a42a19fbf8d769d7638140aa0ef1fb00f"
}
