{
  "format": "id3pm-signature",
  "format_version": 1,
  "algorithm": "ed25519",
  "public_key": "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8",
  "signature": "b8f3bb5bf815eb0853d2caf4eb7cdf159381d8d74be3fb53891e19710958c96e43da61a1bd734c9a6278a91d7d0ee8c4d949cbed2a585f90660313f35d08a50a"
}
