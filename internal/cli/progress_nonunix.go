//go:build !unix

package cli

// onInfoSignal: there is no such signal here.
func onInfoSignal(func()) (stop func()) { return func() {} }
