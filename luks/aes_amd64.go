//go:build !purego

package luks

import "golang.org/x/sys/cpu"

// kernel is a way to do AES with the processor's own instructions.
type kernel int

const (
	noKernel   kernel = iota
	kernelAES         // AES-NI, eight blocks side by side
	kernelVAES        // VAES on 512-bit registers, a sector of 32 blocks side by side
)

func (k kernel) String() string { return [...]string{"none", "AES-NI", "VAES"}[k] }

// kernels returns those that this processor has, the best one last.
func kernels() []kernel {
	x := cpu.X86
	if !x.HasAES || !x.HasSSE41 {
		return nil
	}
	if x.HasAVX512VAES && x.HasAVX512VPCLMULQDQ && x.HasAVX512F && x.HasAVX512BW && x.HasAVX512VL && x.HasAVX512DQ {
		return []kernel{kernelAES, kernelVAES}
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
	n := len(src) / aesBlock
	if k == kernelVAES && n >= 4 {
		encryptVAES(a.rounds, &a.enc[0], &dst[0], &src[0], n/4)
		done := n / 4 * 4
		if n -= done; n == 0 {
			return
		}
		dst, src = dst[done*aesBlock:], src[done*aesBlock:]
	}
	encryptAES(a.rounds, &a.enc[0], &dst[0], &src[0], n)
}

func (k kernel) decrypt(a *aesKey, dst, src []byte) {
	n := len(src) / aesBlock
	if k == kernelVAES && n >= 4 {
		decryptVAES(a.rounds, &a.dec[0], &dst[0], &src[0], n/4)
		done := n / 4 * 4
		if n -= done; n == 0 {
			return
		}
		dst, src = dst[done*aesBlock:], src[done*aesBlock:]
	}
	decryptAES(a.rounds, &a.dec[0], &dst[0], &src[0], n)
}

func (k kernel) encryptXTS(a *aesKey, dst, src []byte, tweaks *[batch * aesBlock]byte, n int) {
	if k == kernelVAES {
		encryptXTSVAES(a.rounds, &a.enc[0], &dst[0], &src[0], &tweaks[0], n)
		return
	}
	encryptXTSAES(a.rounds, &a.enc[0], &dst[0], &src[0], &tweaks[0], n)
}

func (k kernel) decryptXTS(a *aesKey, dst, src []byte, tweaks *[batch * aesBlock]byte, n int) {
	if k == kernelVAES {
		decryptXTSVAES(a.rounds, &a.dec[0], &dst[0], &src[0], &tweaks[0], n)
		return
	}
	decryptXTSAES(a.rounds, &a.dec[0], &dst[0], &src[0], &tweaks[0], n)
}

// n is the number of blocks, at least one.
//
//go:noescape
func encryptAES(rounds int, keys, dst, src *byte, n int)

//go:noescape
func decryptAES(rounds int, keys, dst, src *byte, n int)

// n is the number of groups of four blocks, at least one.
//
//go:noescape
func encryptVAES(rounds int, keys, dst, src *byte, n int)

//go:noescape
func decryptVAES(rounds int, keys, dst, src *byte, n int)

// tweaks has the first tweak of each of n sectors, at least one.
//
//go:noescape
func encryptXTSAES(rounds int, keys, dst, src, tweaks *byte, n int)

//go:noescape
func decryptXTSAES(rounds int, keys, dst, src, tweaks *byte, n int)

//go:noescape
func encryptXTSVAES(rounds int, keys, dst, src, tweaks *byte, n int)

//go:noescape
func decryptXTSVAES(rounds int, keys, dst, src, tweaks *byte, n int)
