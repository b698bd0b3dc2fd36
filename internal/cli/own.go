package cli

import "github.com/spf13/cobra"

// ownCommands are those that drover has and qemu-img has not. They are offered under the name of drover only.
func (a *app) ownCommands() []*cobra.Command {
	return []*cobra.Command{
		a.compactCommand(), a.completionCommand(), a.diffCommand(), a.exportCommand(), a.manCommand(), a.sumCommand(), a.verifyCommand(),
	}
}
