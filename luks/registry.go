package luks

import (
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"hash"
	"slices"
	"sync"
)

// Cipher is a family of block ciphers under the name that LUKS headers have for it.
type Cipher struct {
	Name     string
	KeySizes []int // in bytes
	New      func(key []byte) (cipher.Block, error)
}

var registry struct {
	mu      sync.RWMutex
	ciphers map[string]Cipher
	hashes  map[string]func() hash.Hash
}

// RegisterCipher makes a cipher known. A package calls it from its init function; registering a name twice panics, since
// that is a mistake in the program.
func RegisterCipher(c Cipher) {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	if registry.ciphers == nil {
		registry.ciphers = make(map[string]Cipher)
	}
	if _, ok := registry.ciphers[c.Name]; ok || c.Name == aesName {
		panic(fmt.Sprintf("luks: cipher %q is registered twice", c.Name))
	}
	registry.ciphers[c.Name] = c
}

// RegisterHash makes a hash known, by the rules of RegisterCipher.
func RegisterHash(name string, newHash func() hash.Hash) {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	if registry.hashes == nil {
		registry.hashes = make(map[string]func() hash.Hash)
	}
	if _, ok := registry.hashes[name]; ok || standardHashes[name] != nil {
		panic(fmt.Sprintf("luks: hash %q is registered twice", name))
	}
	registry.hashes[name] = newHash
}

// An UnavailableError is an algorithm that exists, for all this program knows, but not in it.
type UnavailableError struct {
	Kind string // "cipher", "mode", "IV generator", "hash"
	Name string
}

func (e *UnavailableError) Error() string {
	return fmt.Sprintf("%s '%s' is not available in this program", e.Kind, printable(e.Name))
}

func lookupHash(name string) (func() hash.Hash, error) {
	if h := standardHashes[name]; h != nil {
		return h, nil
	}
	registry.mu.RLock()
	defer registry.mu.RUnlock()
	if h := registry.hashes[name]; h != nil {
		return h, nil
	}
	return nil, &UnavailableError{"hash", name}
}

const aesName = "aes"

func lookupCipher(name string) (Cipher, error) {
	if name == aesName {
		return Cipher{aesName, []int{16, 24, 32}, aes.NewCipher}, nil
	}
	registry.mu.RLock()
	defer registry.mu.RUnlock()
	c, ok := registry.ciphers[name]
	if !ok {
		return c, &UnavailableError{"cipher", name}
	}
	return c, nil
}

// newBlocks returns the cipher with a key, by the fastest way this processor has.
func newBlocks(name string, key []byte) (blocks, error) {
	c, err := lookupCipher(name)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(c.KeySizes, len(key)) {
		return nil, headerErrorf("Algorithm '%s' with key size %d bytes not supported", printable(name), len(key))
	}
	if name == aesName {
		if k := bestKernel(); k != noKernel {
			return newAESKey(k, key), nil
		}
	}
	b, err := c.New(key)
	if err != nil {
		return nil, fmt.Errorf("setting up cipher %s: %w", printable(name), err)
	}
	return &oneByOne{b, b.BlockSize()}, nil
}
