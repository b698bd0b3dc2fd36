package luks

import (
	"context"
	"crypto/hmac"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"hash"
	"time"
)

// hashMaker starts a hash.
type hashMaker = func() hash.Hash

// standardHashes are the hashes that need no registration. The weak ones among them are the choice of whoever made the
// volume; LUKS does not rest on their collision resistance.
var standardHashes = map[string]func() hash.Hash{
	"md5":    md5.New,
	"sha1":   sha1.New,
	"sha224": sha256.New224,
	"sha256": sha256.New,
	"sha384": sha512.New384,
	"sha512": sha512.New,
}

// deriveKey derives n bytes from a passphrase by PBKDF2 (RFC 8018). Unlike the standard library's it can be given up: the number of
// iterations may come from a hostile header.
func deriveKey(ctx context.Context, newHash func() hash.Hash, passphrase, salt []byte, iterations uint32, n int) ([]byte, error) {
	const checkEvery = 1 << 12
	prf := hmac.New(newHash, passphrase)
	var key, u, t []byte
	for block := uint32(1); len(key) < n; block++ {
		prf.Reset()
		prf.Write(salt)
		prf.Write(binary.BigEndian.AppendUint32(nil, block))
		u = prf.Sum(u[:0])
		t = append(t[:0], u...)
		for i := uint32(1); i < iterations; i++ {
			if i%checkEvery == 0 && ctx.Err() != nil {
				return nil, ctx.Err()
			}
			prf.Reset()
			prf.Write(u)
			u = prf.Sum(u[:0])
			for k := range t {
				t[k] ^= u[k]
			}
		}
		key = append(key, t...)
	}
	return key[:n], nil
}

// minIterations is the least that any key derivation does, by LUKS's rules.
const minIterations = 1000

// iterationsFor returns how many iterations of a derivation of n bytes take about d on this machine.
func iterationsFor(ctx context.Context, newHash func() hash.Hash, n int, d time.Duration) (uint32, error) {
	const most = 1 << 30
	passphrase, salt := make([]byte, 16), make([]byte, saltSize)
	var best float64 // iterations per second; the best of a few short runs, for other work on the machine only slows them
	for count, runs := uint32(minIterations), 0; runs < 4; {
		began := time.Now()
		if _, err := deriveKey(ctx, newHash, passphrase, salt, count, n); err != nil {
			return 0, err
		}
		took := time.Since(began)
		if took < 5*time.Millisecond && count < most {
			count *= 2
			continue
		}
		best = max(best, float64(count)/max(took.Seconds(), 1e-9))
		runs++
	}
	return uint32(min(max(best*d.Seconds(), minIterations), most)), nil
}
