//go:build !(amd64 || arm64) || purego

package luks

// kernel is a way to do AES with the processor's own instructions. Here there is none.
type kernel int

const noKernel kernel = 0

func bestKernel() kernel { return noKernel }

func kernels() []kernel { return nil }

func newAESKey(kernel, []byte) blocks { return nil }

func newAESXTS(_, _ blocks, _ ivGen) SectorCipher { return nil }
