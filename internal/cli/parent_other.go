//go:build !linux

package cli

import "context"

func watchParent(context.Context, func()) error { return errorf("--exit-with-parent needs Linux") }
