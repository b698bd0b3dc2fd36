//go:build !linux

package cli

import (
	"errors"
	"runtime"

	"github.com/spf13/cobra"
)

// tcmuCommand is here so that the command says why it does not work, instead of being unknown.
func (a *app) tcmuCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "tcmu",
		Short: "Serve images as SCSI disks (Linux only)",
		RunE: func(*cobra.Command, []string) error {
			return errors.New("SCSI disks are served to the target of the Linux kernel; " + runtime.GOOS + " has none")
		},
	}
}
