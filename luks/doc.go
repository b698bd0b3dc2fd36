// Package luks is LUKS version 1 as QEMU uses it: the header with its eight key slots, and the ciphers that encrypt
// 512-byte sectors with the master key that the slots wrap.
//
// It knows nothing of image formats: a header lies in a [Storage] of the caller's, and what is encrypted is whatever the
// caller hands to a [SectorCipher]. AES and the hashes of the standard library are always there; other ciphers and hashes
// come with an import of package luks/ciphers for its side effects.
//
// Headers are untrusted input: [ParseHeader] checks every field, and what an [Open] costs is bounded by [Limits].
package luks
