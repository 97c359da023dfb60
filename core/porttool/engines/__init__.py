"""The engines that come with porttool, registered like any stranger's."""
