package cli

import "context"

// runQemuImg is drover under the name of qemu-img: the commands that both have, and no others.
func (a *app) runQemuImg(ctx context.Context, args []string) error {
	root := a.rootCommand()
	root.Use = a.name + " COMMAND [flags]"
	root.ResetCommands()
	root.AddCommand(a.imageCommands()...)
	for _, c := range root.Commands() {
		c.Flags().SortFlags = false
	}
	return a.execute(ctx, root, args)
}
