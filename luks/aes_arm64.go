//go:build !purego

package luks

import "golang.org/x/sys/cpu"

// kernel is a way to do AES with the processor's own instructions.
type kernel int

const (
	noKernel  kernel = iota
	kernelAES        // the AES instructions of ARMv8, eight blocks side by side
)

func (k kernel) String() string { return [...]string{"none", "ARMv8"}[k] }

// kernels returns those that this processor has, the best one last.
func kernels() []kernel {
	if !cpu.ARM64.HasAES {
		return nil
	}
	return []kernel{kernelAES}
}

func bestKernel() kernel {
	if k := kernels(); k != nil {
		return k[len(k)-1]
	}
	return noKernel
}

func (k kernel) encrypt(a *aesKey, dst, src []byte) {
	encryptAES(a.rounds, &a.enc[0], &dst[0], &src[0], len(src)/aesBlock)
}

func (k kernel) decrypt(a *aesKey, dst, src []byte) {
	decryptAES(a.rounds, &a.dec[0], &dst[0], &src[0], len(src)/aesBlock)
}

func (k kernel) encryptXTS(a *aesKey, dst, src []byte, tweaks *[batch * aesBlock]byte, n int) {
	encryptXTSAES(a.rounds, &a.enc[0], &dst[0], &src[0], &tweaks[0], n)
}

func (k kernel) decryptXTS(a *aesKey, dst, src []byte, tweaks *[batch * aesBlock]byte, n int) {
	decryptXTSAES(a.rounds, &a.dec[0], &dst[0], &src[0], &tweaks[0], n)
}

// n is the number of blocks, at least one.
//
//go:noescape
func encryptAES(rounds int, keys, dst, src *byte, n int)

//go:noescape
func decryptAES(rounds int, keys, dst, src *byte, n int)

// tweaks has the first tweak of each of n sectors, at least one.
//
//go:noescape
func encryptXTSAES(rounds int, keys, dst, src, tweaks *byte, n int)

//go:noescape
func decryptXTSAES(rounds int, keys, dst, src, tweaks *byte, n int)
