// Package ciphers makes the ciphers and hashes known to package luks that the standard library does not have: twofish,
// cast5 and ripemd160. A program imports it for its side effects.
//
// Serpent is not here: no maintained Go library has it.
package ciphers

import (
	"crypto/cipher"

	"golang.org/x/crypto/cast5"     //lint:ignore SA1019 volumes that use it exist and must be readable
	"golang.org/x/crypto/ripemd160" //lint:ignore SA1019 volumes that use it exist and must be readable
	"golang.org/x/crypto/twofish"   //lint:ignore SA1019 volumes that use it exist and must be readable

	"github.com/droverproject/drover/luks"
)

func init() {
	luks.RegisterCipher(luks.Cipher{Name: "twofish", KeySizes: []int{16, 24, 32},
		New: func(key []byte) (cipher.Block, error) { return twofish.NewCipher(key) }})
	luks.RegisterCipher(luks.Cipher{Name: "cast5", KeySizes: []int{16},
		New: func(key []byte) (cipher.Block, error) { return cast5.NewCipher(key) }})
	luks.RegisterHash("ripemd160", ripemd160.New)
}
