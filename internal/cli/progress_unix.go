//go:build unix

package cli

import (
	"os"
	"os/signal"
)

// onInfoSignal has fn called when somebody wants to know how far the program is, until the function returned is called.
func onInfoSignal(fn func()) (stop func()) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, infoSignals...)
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-signals:
				fn()
			case <-done:
				return
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		close(done)
	}
}
