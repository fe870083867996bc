{
  "format": "id3pm-signature",
  "format_version": 1,
  "algorithm": "ed25519",
  "public_key": "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8",
  "signature": "f06f85cd252456936132e123425745216ffec9f5b1408782224991a5ed3780b513a1bbee1b7d92b599c67903941ee5d27d7e817bccb160e106a4a9f3c1a96006"
}
