package luks

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"hash"
)

// A key in a slot is split into stripes, all of which are needed to merge it again: when any part of the material has
// been wiped, the key is gone, also where a disk kept an old copy of some sectors.

// split returns the split form of key, n times as long.
func split(newHash func() hash.Hash, key []byte, n int) ([]byte, error) {
	out := make([]byte, len(key)*n)
	random, last := out[:len(out)-len(key)], out[len(out)-len(key):]
	if _, err := rand.Read(random); err != nil {
		return nil, err
	}
	acc := diffuseAll(newHash, random, len(key))
	subtle.XORBytes(last, acc, key)
	return out, nil
}

// merge returns the key whose split form material is.
func merge(newHash func() hash.Hash, material []byte, size int) []byte {
	random, last := material[:len(material)-size], material[len(material)-size:]
	key := diffuseAll(newHash, random, size)
	subtle.XORBytes(key, key, last)
	return key
}

// diffuseAll folds stripes of the given size into one.
func diffuseAll(newHash func() hash.Hash, stripes []byte, size int) []byte {
	acc := make([]byte, size)
	h := newHash()
	for ; len(stripes) > 0; stripes = stripes[size:] {
		subtle.XORBytes(acc, acc, stripes[:size])
		diffuse(h, acc)
	}
	return acc
}

// diffuse replaces each part of b that is as long as the hash with the hash of its number and itself.
func diffuse(h hash.Hash, b []byte) {
	for i := uint32(0); len(b) > 0; i++ {
		part := b[:min(len(b), h.Size())]
		h.Reset()
		h.Write(binary.BigEndian.AppendUint32(nil, i))
		h.Write(part)
		copy(part, h.Sum(nil))
		b = b[len(part):]
	}
}
